/* Signals of the runtime (amd_signal_t, 64 bytes): a counter that ends at 0, and an event that wakes who sleeps on it.
 * Offsets from ROCr's amd_hsa_signal.h. */

enum { SIGNAL_VALUE = 8, SIGNAL_MAILBOX = 16, SIGNAL_EVENT = 24, SIGNAL_START = 32, SIGNAL_END = 40 };

static void raise_event(struct device *d, unsigned event) {
	if (!event) return;
	if (!d->set_event) die("device %d was given no function for events", d->number);
	d->set_event(d->set_event_data, event);
}

static int64_t signal_value(struct device *d, uint64_t signal) {
	int64_t *v = shared_word(d, "signal", signal + SIGNAL_VALUE, 8);
	return __atomic_load_n(v, __ATOMIC_ACQUIRE);
}

/* What a compute queue does at the end of a packet: times, counter, event, in this order. */
static void complete_signal(struct device *d, uint64_t signal, uint64_t started) {
	if (!signal) return;
	uint64_t now = ticks(), mailbox;
	uint32_t event;
	device_write(d, "start time of a signal", signal + SIGNAL_START, &started, 8);
	device_write(d, "end time of a signal", signal + SIGNAL_END, &now, 8);
	/* Read before the counter falls: the runtime may reuse the signal from then on. */
	device_read(d, "mailbox of a signal", &mailbox, signal + SIGNAL_MAILBOX, 8);
	device_read(d, "event of a signal", &event, signal + SIGNAL_EVENT, 4);
	int64_t *value = shared_word(d, "signal", signal + SIGNAL_VALUE, 8);
	__atomic_fetch_sub(value, 1, __ATOMIC_ACQ_REL);
	if (mailbox) {
		uint64_t word = event;
		device_write(d, "mailbox of a signal", mailbox, &word, 8);
		raise_event(d, event);
	}
}
