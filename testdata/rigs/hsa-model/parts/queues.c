/* A queue of the device is a thread: queues run side by side, as those of a GPU do, and one that waits for another
 * holds up nobody. The interface has no doorbell, so a thread looks at the write pointer, often at first and then more
 * and more seldom. */

struct queue {
	struct device *device;
	struct queue_info info;
	pthread_t thread;
	int stop;                 /* set when the runtime destroys the queue */
	uint64_t *written, *read; /* how far the runtime has written, how far the device has read */
};

static int stopped(struct queue *q) { return __atomic_load_n(&q->stop, __ATOMIC_ACQUIRE); }

static void pause_for(unsigned long us) {
	struct timespec t = {us / 1000000, us % 1000000 * 1000};
	nanosleep(&t, NULL);
}

static void doze(unsigned *turns) { pause_for(*turns < 20 ? 5 : *turns < 200 ? 50 : 400), ++*turns; }

/* Waits until the gate is open; false when the queue is destroyed meanwhile. */
static int passes_gate(struct queue *q) {
	for (int waits = 0; settings.gate && !access(settings.gate, F_OK); waits = 1) {
		if (stopped(q)) return 0;
		if (!waits) say("device %d: a copy waits at the gate", q->device->number);
		pause_for(1000);
	}
	return 1;
}

/* A queue that hangs, if the number of what it has come to is the one to hang at: it executes nothing more, and only
 * goes away when the runtime destroys it. */
static int stalls(struct queue *q, unsigned long number, unsigned long at, const char *what) {
	if (number != at) return 0;
	say("device %d: a queue stops at %s %lu", q->device->number, what, at);
	while (!stopped(q)) pause_for(1000);
	return 1;
}

static void *run_sdma(void *);
static void *run_aql(void *);

static struct queue *start_queue(struct device *d, struct queue_info *info) {
	struct queue *q = calloc(1, sizeof *q);
	if (!q) die("no memory for a queue");
	q->device = d, q->info = *info;
	q->written = shared_word(d, "write pointer of a queue", info->write_pointer, 8);
	q->read = shared_word(d, "read pointer of a queue", info->read_pointer, 8);
	if (info->ring_size & (info->ring_size - 1)) die("a ring of %u bytes, which is no power of two", info->ring_size);
	void *(*run)(void *) = info->type == QUEUE_SDMA ? run_sdma : info->type == QUEUE_COMPUTE_AQL ? run_aql : NULL;
	if (!run) die("a queue of the unknown type %u", info->type);
	TRACE("device %d: queue of type %u, ring of %u bytes at 0x%llx", d->number, info->type, info->ring_size,
	      (unsigned long long)info->ring);
	if (pthread_create(&q->thread, NULL, run, q)) die("no thread for a queue");
	return q;
}

static void end_queue(struct queue *q) {
	__atomic_store_n(&q->stop, 1, __ATOMIC_RELEASE);
	pthread_join(q->thread, NULL);
	free(q);
}
