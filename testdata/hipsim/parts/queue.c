/* Operations, streams, events, and the thread of a stream that executes what is queued on it. */

/* A mark is what one hipEventRecord leaves: events, waits and the queue share it. */
struct mark { int refs, done, code; struct timespec at; };

/* An event. While it stands for work of a captured stream it has no mark: capture says of which capture it is, from and
 * position where in which stream. */
struct event {
	int dev, live;
	unsigned flags;
	struct mark *mark;
	unsigned long capture; /* the number of a capture, 0: none */
	struct stream *from;
	long position;
	struct event *next;
};

/* A launch is a kernel, its grid and its arguments: one after the other, each aligned as its type asks for. */
struct launch {
	int refs;
	struct function *function;
	unsigned grid[3], block[3], shared;
	size_t size;
	char args[] __attribute__((aligned(16)));
};

enum what { COPY, SET, RECORD, WAIT, FREE, LAUNCH };
struct op {
	enum what what;
	uintptr_t dst, src;
	size_t n;
	int value;
	struct launch *launch;
	struct mark *mark;
	struct fault fault;
	struct op *next;
};

struct stream {
	int dev, live, stop, code; /* code: of the first operation that failed; it stays */
	unsigned flags, seed;
	pthread_t thread;
	struct op *head, **tail;
	struct capture *capture; /* if the stream is being captured; see capture.c */
	long position, joined;   /* operations captured, and how many of them another stream has waited for */
	struct stream *next;
};
static struct stream *streams; /* closed ones stay in the lists, so that no address is given out twice */
static struct event *events;

static int run_kernel(struct launch *l);
static int capture_op(struct stream *s, struct op op);

static void unref(struct mark *m) { if (m && --m->refs == 0) free(m); }

static void drop_launch(struct launch *l) { if (l && --l->refs == 0) free(l); }

static struct stream *find_stream(void *h) {
	for (struct stream *s = streams; s; s = s->next)
		if (s == h && s->live) return s;
	if (cfg.version >= HIP_7_2) {
		fprintf(stderr, "hipsim: invalid stream %p: HIP 7 crashes here\n", h);
		abort();
	}
	misuse(CONTEXT_DESTROYED, "invalid stream (the null stream is refused, too)");
	return NULL;
}

static struct event *find_event(void *h) {
	for (struct event *e = events; e; e = e->next)
		if (e == h && e->live) return e;
	misuse(INVALID_HANDLE, "invalid event");
	return NULL;
}

/* bytes returns where n bytes at p really are. It is NULL if they are in device memory that is freed, unmapped, or
 * that no device may access in this way. */
static char *bytes(uintptr_t p, size_t n, int prot) {
	struct range *r = overlap(p, n);
	if (!r) return reserved(p, n) ? NULL : (char *)p; /* memory of the host that HIP does not know */
	if (!inside(r, p, n)) return NULL;
	if (r->kind == VIRTUAL) {
		int all = 0;
		for (int dev = 0; dev < MAX_DEVICES; dev++) all |= r->access[dev];
		if ((all & prot) != prot) return NULL;
	}
	return r->data + (p - r->addr);
}

static int run_copy(uintptr_t dst, uintptr_t src, size_t n) {
	char *d = bytes(dst, n, PROT_WRITE), *s = bytes(src, n, PROT_READ);
	if (!d || !s) return ILLEGAL_ADDRESS;
	pthread_mutex_unlock(&lock);
	memcpy(d, s, n);
	pthread_mutex_lock(&lock);
	add(S_COPIES, 1);
	add(S_COPIED, n);
	struct range *to = overlap(dst, n); /* the list may have changed */
	if (inside(to, dst, n) && on_device(to) && !on_device(overlap(src, n))) delivered(to, dst - to->addr, n);
	return SUCCESS;
}

/* run does one operation, under the lock, and returns its code. */
static int run(struct op *op) {
	char *d;
	struct range **link;
	switch (op->what) {
	case COPY:
		if (!overlap(op->dst, op->n) || !overlap(op->src, op->n)) return ILLEGAL_ADDRESS; /* freed meanwhile */
		return run_copy(op->dst, op->src, op->n);
	case SET:
		if (!overlap(op->dst, op->n) || !(d = bytes(op->dst, op->n, PROT_WRITE))) return ILLEGAL_ADDRESS;
		memset(d, op->value, op->n);
		add(S_MEMSETS, 1);
		return SUCCESS;
	case WAIT:
		while (!op->mark->done) pthread_cond_wait(&changed, &lock);
		return op->mark->code;
	case FREE:
		if ((link = find_start(op->dst))) remove_range(link);
		return SUCCESS;
	case LAUNCH:
		return run_kernel(op->launch);
	case RECORD:
		return SUCCESS;
	}
	return SUCCESS;
}

/* work is the thread of a stream. */
static void *work(void *arg) {
	struct stream *s = arg;
	pthread_mutex_lock(&lock);
	for (;;) {
		struct op *op = s->head;
		if ((!op && !s->stop) || (op && cfg.hold)) { pthread_cond_wait(&changed, &lock); continue; }
		if (!op) break;
		long delay = cfg.delay_us > 0 ? rand_r(&s->seed) % (cfg.delay_us + 1) : 0;
		if (delay) {
			pthread_mutex_unlock(&lock);
			usleep(delay);
			pthread_mutex_lock(&lock);
		}
		if (op->fault.mode == STALL) stall(op->fault.ms);
		if (!s->code) s->code = op->fault.mode == ASYNC ? op->fault.code : run(op);
		if (op->what == RECORD) {
			op->mark->done = 1;
			op->mark->code = s->code;
			clock_gettime(CLOCK_MONOTONIC, &op->mark->at);
		}
		unref(op->mark);
		drop_launch(op->launch);
		s->head = op->next;
		if (!s->head) s->tail = &s->head;
		free(op);
		pthread_cond_broadcast(&changed);
	}
	pthread_mutex_unlock(&lock);
	return NULL;
}

/* push queues an operation for the stream's thread. The operation takes over one reference of what it refers to. */
static int push(struct stream *s, struct op init) {
	struct op *op = malloc(sizeof *op);
	*op = init;
	op->next = NULL;
	*s->tail = op;
	s->tail = &op->next;
	pthread_cond_broadcast(&changed);
	return SUCCESS;
}

/* enqueue is push with the fault that is armed for this call; on a stream that is being captured the operation goes
 * to the graph instead. */
static int enqueue(struct stream *s, struct op op) {
	op.fault = armed;
	return s->capture ? capture_op(s, op) : push(s, op);
}

static int drain(struct stream *s) {
	while (s->head) pthread_cond_wait(&changed, &lock);
	return s->code;
}

static int drain_device(int dev) {
	int code = SUCCESS;
	for (struct stream *s = streams; s; s = s->next)
		if (!s->stop && s->dev == dev) { int c = drain(s); if (!code) code = c; }
	return code;
}

/* settle_work is drain_device for calls that free something: with HIPSIM_WAITS they wait for all devices. */
static void settle_work(int dev) {
	for (int d = 0; d < cfg.devices; d++)
		if (d == dev || cfg.waits) drain_device(d);
}
