/* Graphs: the entry points that capture a stream, and what is made of a capture. */

struct graph { int live; struct op *ops; struct graph *next; };
struct exec { int live, dev; struct op *ops; struct mark *last; struct stream *on; struct exec *next; };
static struct graph *graphs; /* as streams, closed ones stay */
static struct exec *execs;
static unsigned long captures; /* how many there have been */

static struct graph *find_graph(void *h) {
	for (struct graph *g = graphs; g; g = g->next)
		if (g == h && g->live) return g;
	misuse(INVALID_VALUE, "invalid graph");
	return NULL;
}

static struct exec *find_exec(void *h) {
	for (struct exec *e = execs; e; e = e->next)
		if (e == h && e->live) return e;
	misuse(INVALID_VALUE, "invalid executable graph");
	return NULL;
}

/* copy_op makes an operation of its own from one of a graph. */
static struct op copy_op(const struct op *op) {
	struct op copy = *op;
	use_launch(copy.launch);
	copy.next = NULL;
	return copy;
}

/* ---- capture ---- */

SYNC_API(hipStreamBeginCapture, (void *h, int mode), (h, mode)) {
	if (!h) return misuse(CAPTURE_UNSUPPORTED, "hipStreamBeginCapture: the null stream cannot be captured");
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	if (mode < CAPTURE_GLOBAL || mode > CAPTURE_RELAXED) return misuse(INVALID_VALUE, "hipStreamBeginCapture: mode");
	if (s->capture) return misuse(ILLEGAL_STATE, "hipStreamBeginCapture: the stream is being captured");
	struct capture *c = calloc(1, sizeof *c);
	c->number = ++captures;
	c->mode = mode;
	c->thread = pthread_self();
	c->origin = s;
	c->tail = &c->head;
	s->capture = c;
	s->position = s->joined = 0;
	return SUCCESS;
}

/* unjoined reports whether a stream of the capture has work for which no other stream of it waits. */
static int unjoined(const struct capture *c) {
	for (struct stream *s = streams; s; s = s->next)
		if (s->capture == c && s != c->origin && s->joined < s->position) return 1;
	return 0;
}

/* finish is hipStreamEndCapture. Where it is called rightly the capture ends, with or without a graph; fault is the
 * code of an injected fault. */
static int finish(struct stream *s, void **out, int fault) {
	struct capture *c = s->capture;
	if (!out) return misuse(INVALID_VALUE, "hipStreamEndCapture: null pointer");
	if (!c) return misuse(ILLEGAL_STATE, "hipStreamEndCapture: the stream is not being captured");
	if (c->mode != CAPTURE_RELAXED && !pthread_equal(c->thread, pthread_self()))
		return misuse(CAPTURE_WRONG_THREAD, "hipStreamEndCapture: another thread has begun this capture");
	if (c->origin != s) {
		c->invalid = 1;
		return misuse(CAPTURE_UNMATCHED, "hipStreamEndCapture: the capture has begun on another stream");
	}
	int code = fault ? fault : c->invalid ? CAPTURE_INVALIDATED : !unjoined(c) ? SUCCESS
		: misuse(CAPTURE_UNJOINED, "hipStreamEndCapture: a stream that has joined was not waited for");
	struct op *ops = end_capture(c);
	*out = NULL;
	if (code) {
		free_ops(ops);
		return code;
	}
	struct graph *g = calloc(1, sizeof *g);
	*g = (struct graph){ .live = 1, .ops = ops, .next = graphs };
	*out = graphs = g;
	add(S_GRAPHS, 1);
	return SUCCESS;
}

int hipStreamEndCapture(void *h, void **out) {
	static struct func f = {"hipStreamEndCapture", 0, 0};
	int code = enter(&f);
	if (owner != getpid() || !cfg.devices) return leave(code ? code : INVALID_DEVICE);
	if (!code) code = late_fault();
	struct stream *s = find_stream(h);
	return leave(s ? finish(s, out, code) : CONTEXT_DESTROYED);
}

SYNC_API(hipStreamIsCapturing, (void *h, int *status), (h, status)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	if (!status) return misuse(INVALID_VALUE, "hipStreamIsCapturing: null pointer");
	*status = !s->capture ? 0 : s->capture->invalid ? 2 : 1; /* none, active, invalidated */
	return SUCCESS;
}

/* ---- graphs ---- */

/* launch_device is the device of the first kernel of a graph, -1 if there is none. */
static int launch_device(const struct op *op) {
	while (op && op->what != LAUNCH) op = op->next;
	return op ? op->launch->function->module->dev : -1;
}

SYNC_API(hipGraphInstantiate, (void **out, void *graph, void **node, char *text, size_t n),
	(out, graph, node, text, n)) {
	struct graph *g = find_graph(graph);
	if (!g) return INVALID_VALUE;
	if (!out) return misuse(INVALID_VALUE, "hipGraphInstantiate: null pointer");
	if (node) *node = NULL;
	if (text && n) *text = 0;
	struct exec *e = calloc(1, sizeof *e);
	*e = (struct exec){ .live = 1, .dev = launch_device(g->ops), .next = execs };
	struct op **tail = &e->ops;
	for (const struct op *op = g->ops; op; op = op->next, tail = &(*tail)->next) {
		*tail = malloc(sizeof **tail);
		**tail = copy_op(op);
	}
	execs = e;
	add(S_EXECS, 1);
	*out = e;
	return SUCCESS;
}

/* One executable graph never runs twice at once: a launch waits for the one before it. A fault that is armed hits the
 * first operation. */
DEVICE_API(hipGraphLaunch, (void *exec, void *h), (exec, h)) {
	struct exec *e = find_exec(exec);
	if (!e) return INVALID_VALUE;
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	NOT_CAPTURED(s);
	if (e->dev >= 0 && e->dev != s->dev)
		return misuse(INVALID_VALUE, "hipGraphLaunch: a kernel of another device than the stream's");
	if (e->last && e->on != s) {
		e->last->refs++;
		push(s, (struct op){ .what = WAIT, .mark = e->last });
	}
	struct fault fault = armed;
	for (const struct op *op = e->ops; op; op = op->next) {
		struct op copy = copy_op(op);
		if (fault.mode != NOW) copy.fault = fault;
		fault.mode = NOW;
		push(s, copy);
	}
	unref(e->last);
	e->last = calloc(1, sizeof *e->last);
	e->last->refs = 2;
	e->on = s;
	push(s, (struct op){ .what = RECORD, .mark = e->last, .fault = fault });
	add(S_GRAPH_LAUNCHES, 1);
	return SUCCESS;
}

/* What is launched goes on. */
SYNC_API(hipGraphExecDestroy, (void *exec), (exec)) {
	struct exec *e = find_exec(exec);
	if (!e) return INVALID_VALUE;
	e->live = 0;
	free_ops(e->ops);
	unref(e->last);
	e->ops = NULL;
	e->last = NULL;
	add(S_EXECS, -1);
	return SUCCESS;
}

SYNC_API(hipGraphDestroy, (void *graph), (graph)) {
	struct graph *g = find_graph(graph);
	if (!g) return INVALID_VALUE;
	g->live = 0;
	free_ops(g->ops);
	g->ops = NULL;
	add(S_GRAPHS, -1);
	return SUCCESS;
}
