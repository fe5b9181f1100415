/* A stream that is captured queues nothing: what is called on it becomes operations of a graph. Other streams join
 * the capture by waiting for an event that was recorded in it. The operations are kept in the order of the calls,
 * which is an order that all waits between them allow, so that a graph is executed as one list. graphs.c has the
 * entry points. */

enum { CAPTURE_GLOBAL, CAPTURE_THREAD, CAPTURE_RELAXED }; /* hipStreamCaptureMode */
struct capture {
	unsigned long number;
	int mode, invalid;
	pthread_t thread;      /* that began it */
	struct stream *origin; /* on which it began, and on which it has to end */
	struct op *head, **tail;
};

#ifndef HIPSIM_NO_OPTIONAL
static struct launch *use_launch(struct launch *l) { if (l) l->refs++; return l; }

static void free_ops(struct op *op) {
	while (op) {
		struct op *next = op->next;
		unref(op->mark);
		drop_launch(op->launch);
		free(op);
		op = next;
	}
}

/* end_capture takes all streams out of a capture and forgets it. The operations are the caller's now. */
static struct op *end_capture(struct capture *c) {
	for (struct stream *s = streams; s; s = s->next)
		if (s->capture == c) s->capture = NULL;
	struct op *ops = c->head;
	free(c);
	return ops;
}
#endif

/* leave_capture is what destroying a stream does to its capture: it ends if it has begun on that stream, else it is
 * invalid. */
static void leave_capture(struct stream *s) {
#ifndef HIPSIM_NO_OPTIONAL
	struct capture *c = s->capture;
	s->capture = NULL;
	if (c && c->origin == s) free_ops(end_capture(c));
	else if (c) c->invalid = 1;
#else
	(void)s;
#endif
}

/* capture_op adds an operation to the capture of the stream. */
static int capture_op(struct stream *s, struct op init) {
	struct capture *c = s->capture;
	if (c->invalid || init.what == FREE) {
		c->invalid = 1;
		unref(init.mark);
		drop_launch(init.launch);
		return misuse(init.what == FREE ? CAPTURE_UNSUPPORTED : CAPTURE_INVALIDATED, "not while this stream is captured");
	}
	struct op *op = malloc(sizeof *op);
	*op = init;
	op->next = NULL;
	*c->tail = op;
	c->tail = &op->next;
	s->position++;
	return SUCCESS;
}

/* not_captured returns 900 if the stream is being captured, which such a call makes invalid. */
static int not_captured(struct stream *s) {
	if (!s->capture) return SUCCESS;
	s->capture->invalid = 1;
	return misuse(CAPTURE_UNSUPPORTED, "the stream is being captured: what is asked of it will not happen");
}

/* no_capture returns 900 for a call that may wait for the device, if a capture forbids such calls: one in global mode
 * forbids them to every thread, one in thread mode to its own. The capture becomes invalid. */
static int no_capture(void) {
	for (struct stream *s = streams; s; s = s->next) {
		struct capture *c = s->live ? s->capture : NULL;
		if (!c || c->mode == CAPTURE_RELAXED || (c->mode == CAPTURE_THREAD && !pthread_equal(c->thread, pthread_self())))
			continue;
		c->invalid = 1;
		return misuse(CAPTURE_UNSUPPORTED, "not while a stream is captured");
	}
	return SUCCESS;
}

#define NO_CAPTURE() do { int code_ = no_capture(); if (code_) return code_; } while (0)
#define NOT_CAPTURED(s) do { int code_ = not_captured(s); if (code_) return code_; } while (0)
