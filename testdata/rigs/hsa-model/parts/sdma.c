/* The copy engines (SDMA). Packets are words; the first has the operation in its low byte and a suboperation in the
 * next. Layouts from ROCr's sdma_registers.h. */

enum {
	SDMA_NOP = 0,
	SDMA_COPY = 1,
	SDMA_FENCE = 5,
	SDMA_TRAP = 6,
	SDMA_POLL = 8,
	SDMA_ATOMIC = 10,
	SDMA_FILL = 11,
	SDMA_TIMESTAMP = 13,
	SDMA_GCR = 17,
};

static uint64_t wide(const uint32_t *w) { return w[0] | (uint64_t)w[1] << 32; }

/* Reads words of the ring, and wraps; false once the runtime destroys the queue. */
static void ring_words(struct queue *q, uint64_t at, uint32_t *to, unsigned words) {
	uint64_t mask = q->info.ring_size - 1;
	for (unsigned i = 0; i < words; i++)
		device_read(q->device, "packet", to + i, q->info.ring + ((at + 4 * i) & mask), 4);
}

static void expect(struct queue *q, int ok, const char *what, const uint32_t *w) {
	if (!ok) die("SDMA packet on device %d: %s: %08x %08x %08x %08x", q->device->number, what, w[0], w[1], w[2], w[3]);
}

/* Waits for a word in memory: function 3 is "equal", 0 "always". The other functions are not used by the runtime. */
static int poll_word(struct queue *q, const uint32_t *w) {
	unsigned function = w[0] >> 28 & 7;
	if (w[0] >> 31 == 0) { /* not memory but a register: the runtime's flush of the host data path */
		expect(q, function == 0 && w[1] == 0, "a register is polled", w);
		return 1;
	}
	expect(q, function == 3, "polls with an unknown comparison", w);
	uint32_t *word = shared_word(q->device, "SDMA poll", wide(w + 1), 4);
	for (unsigned turns = 0; (__atomic_load_n(word, __ATOMIC_ACQUIRE) & w[4]) != w[3]; doze(&turns))
		if (stopped(q)) return 0;
	return 1;
}

static int linear_copy(struct queue *q, uint64_t to, uint64_t from, uint64_t n) {
	static unsigned long copies;
	unsigned long number = __atomic_add_fetch(&copies, 1, __ATOMIC_RELAXED);
	if (stalls(q, number, settings.stall_copy, "copy") || !passes_gate(q)) return 0;
	if (number == settings.fault_copy) fault(q->device, "SDMA copy", to, from, n);
	device_copy(q->device, "SDMA copy", to, from, n);
	if (number == settings.flip_copy) {
		uint8_t byte;
		device_read(q->device, "SDMA copy", &byte, to + n / 2, 1);
		byte ^= 1;
		device_write(q->device, "SDMA copy", to + n / 2, &byte, 1);
	}
	return 1;
}

static void fill(struct queue *q, const uint32_t *w) {
	uint64_t to = wide(w + 1), n = (w[4] & 0x3fffff) + 4;
	expect(q, w[0] >> 30 == 2 && n % 4 == 0, "fills with other than words", w);
	uint32_t block[1024];
	for (unsigned i = 0; i < 1024; i++) block[i] = w[3];
	for (uint64_t done = 0, part; done < n; done += part) {
		part = n - done < sizeof block ? n - done : sizeof block;
		device_write(q->device, "SDMA fill", to + done, block, part);
	}
}

/* Executes one packet and answers its length in bytes; 0 when the queue was destroyed meanwhile. */
static uint64_t sdma_packet(struct queue *q, uint64_t pos) {
	struct device *d = q->device;
	uint32_t w[8] = {0};
	ring_words(q, pos, w, 1);
	unsigned op = w[0] & 0xff, sub = w[0] >> 8 & 0xff;
	switch (op) {
	case SDMA_NOP: /* the upper half counts the words that follow and are skipped */
		return 4 + 4 * (uint64_t)(w[0] >> 16 & 0x3fff);
	case SDMA_COPY:
		ring_words(q, pos, w, 7);
		expect(q, sub == 0, "a copy that is not linear", w);
		expect(q, w[0] >> 16 == 0 && w[1] >> 30 == 0 && w[2] == 0, "a copy with unknown flags", w);
		TRACE("device %d: SDMA copies %u bytes from 0x%llx to 0x%llx", d->number, w[1] + 1,
		      (unsigned long long)wide(w + 3), (unsigned long long)wide(w + 5));
		return linear_copy(q, wide(w + 5), wide(w + 3), (uint64_t)w[1] + 1) ? 28 : 0;
	case SDMA_FENCE:
		ring_words(q, pos, w, 4);
		TRACE("device %d: SDMA fence 0x%llx = %u", d->number, (unsigned long long)wide(w + 1), w[3]);
		__atomic_store_n((uint32_t *)shared_word(d, "SDMA fence", wide(w + 1), 4), w[3], __ATOMIC_RELEASE);
		return 16;
	case SDMA_TRAP:
		ring_words(q, pos, w, 2);
		TRACE("device %d: SDMA trap, event %u", d->number, w[1]);
		raise_event(d, w[1] & 0xfffffff);
		return 8;
	case SDMA_POLL:
		ring_words(q, pos, w, 6);
		TRACE("device %d: SDMA poll of 0x%llx for %u", d->number, (unsigned long long)wide(w + 1), w[3]);
		return poll_word(q, w) ? 24 : 0;
	case SDMA_ATOMIC:
		ring_words(q, pos, w, 8);
		expect(q, w[0] >> 25 == 47 && w[7] == 0, "an atomic operation that is not a 64-bit addition", w);
		TRACE("device %d: SDMA adds %lld at 0x%llx", d->number, (long long)wide(w + 3),
		      (unsigned long long)wide(w + 1));
		__atomic_fetch_add((uint64_t *)shared_word(d, "SDMA atomic", wide(w + 1), 8), wide(w + 3), __ATOMIC_ACQ_REL);
		return 32;
	case SDMA_FILL:
		ring_words(q, pos, w, 5);
		fill(q, w);
		return 20;
	case SDMA_TIMESTAMP:
		ring_words(q, pos, w, 3);
		expect(q, sub == 2, "a timestamp that is not the global one", w);
		uint64_t now = ticks();
		device_write(d, "SDMA timestamp", wide(w + 1), &now, 8);
		return 12;
	case SDMA_GCR: /* caches are written back and invalidated: there are none */
		ring_words(q, pos, w, 5);
		expect(q, sub == 1, "an unknown cache operation", w);
		return 20;
	}
	ring_words(q, pos, w, 4);
	expect(q, 0, "unknown operation", w);
	return 0;
}

/* Read and write pointers of a copy queue count bytes and never wrap. */
static void *run_sdma(void *arg) {
	struct queue *q = arg;
	uint64_t pos = __atomic_load_n(q->read, __ATOMIC_ACQUIRE);
	for (unsigned turns = 0; !stopped(q);) {
		if (pos == __atomic_load_n(q->written, __ATOMIC_ACQUIRE)) {
			doze(&turns);
			continue;
		}
		turns = 0;
		uint64_t n = sdma_packet(q, pos);
		if (!n) break;
		pos += n;
		__atomic_store_n(q->read, pos, __ATOMIC_RELEASE);
	}
	return NULL;
}
