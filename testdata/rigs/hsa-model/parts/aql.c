/* Compute queues. A packet is 64 bytes; its header's low byte is the type, and the last 8 bytes are the signal of its
 * end. Kernels cannot be executed here. Layouts from the HSA specification, hsa.h and ROCr's hsa_ext_amd.h. */

enum {
	AQL_VENDOR = 0,
	AQL_INVALID = 1, /* not written yet */
	AQL_KERNEL = 2,
	AQL_BARRIER_AND = 3,
	AQL_BARRIER_OR = 5,
};
enum { AQL_PM4 = 1, AQL_BARRIER_VALUE = 2 }; /* formats of a vendor's packet, in its second half word */
enum { PM4_INDIRECT = 0x3f, PM4_ACQUIRE_MEM = 0x58 };

/* Commands of the command processor in a buffer elsewhere. The runtime invalidates caches with them. */
static void run_pm4(struct device *d, const uint32_t *jump) {
	uint64_t at = (uint64_t)(jump[1] & ~3u) | (uint64_t)(jump[2] & 0xffff) << 32;
	uint32_t n = jump[3] & 0xfffff, w[64];
	if ((jump[0] >> 8 & 0xff) != PM4_INDIRECT || n > 64) die("an unknown PM4 packet %08x of %u words", jump[0], n);
	device_read(d, "PM4 commands", w, at, 4 * n);
	for (uint32_t i = 0; i < n; i += 2 + (w[i] >> 16 & 0x3fff))
		if (w[i] >> 30 != 3 || (w[i] >> 8 & 0xff) != PM4_ACQUIRE_MEM) die("an unknown PM4 command %08x", w[i]);
}

/* Waits for up to five signals to be 0: for all, or for one. False when the queue is destroyed meanwhile. */
static int barrier(struct queue *q, const uint64_t *packet, int all) {
	for (unsigned turns = 0;; doze(&turns)) {
		int waits = 0, zero = 0, any = 0;
		for (int i = 0; i < 5; i++) {
			if (!packet[1 + i]) continue;
			any = 1;
			if (signal_value(q->device, packet[1 + i]) == 0) zero = 1;
			else waits = 1;
		}
		if (all ? !waits : zero || !any) return 1;
		if (stopped(q)) return 0;
	}
}

/* Waits until a signal's masked value compares as the packet asks: 0 equal, 1 not equal, 2 less, 3 greater or equal.
 * Without a signal there is nothing to wait for. */
static int barrier_value(struct queue *q, const uint64_t *packet) {
	if (!packet[1]) return 1;
	int64_t value = packet[2], mask = packet[3];
	uint32_t condition = packet[4];
	for (unsigned turns = 0;; doze(&turns)) {
		int64_t now = signal_value(q->device, packet[1]) & mask;
		int met = condition == 0   ? now == value
			  : condition == 1 ? now != value
			  : condition == 2 ? now < value
			  : condition == 3 ? now >= value
					   : -1;
		if (met < 0) die("a barrier with the unknown condition %u", condition);
		if (met) return 1;
		if (stopped(q)) return 0;
	}
}

static int aql_packet(struct queue *q, const uint64_t *packet) {
	struct device *d = q->device;
	unsigned type = packet[0] & 0xff, format = packet[0] >> 16 & 0xffff;
	uint64_t started = ticks();
	int done = 1;
	TRACE("device %d: AQL packet of type %u, format %u, signal 0x%llx", d->number, type, format,
	      (unsigned long long)packet[7]);
	static unsigned long packets;
	unsigned long number = __atomic_add_fetch(&packets, 1, __ATOMIC_RELAXED);
	if (stalls(q, number, settings.stall_aql, "packet")) return 0;
	if (type == AQL_BARRIER_AND || type == AQL_BARRIER_OR) done = barrier(q, packet, type == AQL_BARRIER_AND);
	else if (type == AQL_VENDOR && (format & 0xff) == AQL_BARRIER_VALUE) done = barrier_value(q, packet);
	else if (type == AQL_VENDOR && format == AQL_PM4) run_pm4(d, (const uint32_t *)packet + 1);
	else if (type == AQL_KERNEL)
		die("a kernel is launched on device %d (code object 0x%llx): this model executes none", d->number,
		    (unsigned long long)packet[4]);
	else die("an unknown AQL packet on device %d: %016llx", d->number, (unsigned long long)packet[0]);
	if (done) complete_signal(d, packet[7], started);
	return done;
}

/* Read and write pointers of a compute queue count packets and never wrap. The write pointer moves before the packet is
 * written: its header says when it is whole. */
static void *run_aql(void *arg) {
	struct queue *q = arg;
	uint64_t pos = __atomic_load_n(q->read, __ATOMIC_ACQUIRE), slots = q->info.ring_size / 64;
	for (unsigned turns = 0; !stopped(q);) {
		uint64_t where = q->info.ring + pos % slots * 64;
		if (pos == __atomic_load_n(q->written, __ATOMIC_ACQUIRE)) {
			doze(&turns);
			continue;
		}
		uint32_t *header = shared_word(q->device, "AQL packet", where, 4);
		if ((__atomic_load_n(header, __ATOMIC_ACQUIRE) & 0xff) == AQL_INVALID) {
			doze(&turns);
			continue;
		}
		turns = 0;
		uint64_t packet[8];
		device_read(q->device, "AQL packet", packet, where, sizeof packet);
		if (!aql_packet(q, packet)) break;
		__atomic_store_n(header, AQL_INVALID, __ATOMIC_RELEASE);
		__atomic_store_n(q->read, ++pos, __ATOMIC_RELEASE);
	}
	return NULL;
}
