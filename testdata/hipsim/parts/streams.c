/* The entry points of streams and events. */

/* ---- streams ---- */

DEVICE_API(hipStreamCreateWithFlags, (void **out, unsigned flags), (out, flags)) {
	if (!out || flags > 1) return misuse(INVALID_VALUE, "hipStreamCreateWithFlags");
	struct stream *s = calloc(1, sizeof *s);
	s->dev = current;
	s->live = 1;
	s->flags = flags;
	s->tail = &s->head;
	s->seed = cfg.seed++;
	if (pthread_create(&s->thread, NULL, work, s)) { free(s); return OUT_OF_MEMORY; }
	s->next = streams;
	streams = s;
	add(S_STREAMS, 1);
	*out = s;
	return SUCCESS;
}

DEVICE_API(hipStreamDestroy, (void *h), (h)) {
	if (!h) return misuse(INVALID_HANDLE, "hipStreamDestroy: the null stream");
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	leave_capture(s);
	s->live = 0;
	drain(s);
	if (cfg.waits) settle_work(s->dev);
	s->stop = 1;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	pthread_join(s->thread, NULL);
	pthread_mutex_lock(&lock);
	add(S_STREAMS, -1);
	return SUCCESS;
}

DEVICE_API(hipStreamSynchronize, (void *h), (h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	NOT_CAPTURED(s);
	return drain(s);
}

DEVICE_API(hipStreamQuery, (void *h), (h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	NOT_CAPTURED(s);
	return s->code ? s->code : s->head ? NOT_READY : SUCCESS;
}

/* wait_captured lets a stream wait for an event that stands for captured work: the stream joins the capture. */
static int wait_captured(struct stream *s, struct event *e) {
	struct capture *c = e->from->live ? e->from->capture : NULL;
	if (!c || c->number != e->capture) {
		if (s->capture) s->capture->invalid = 1;
		return misuse(s->capture ? CAPTURE_ISOLATION : CAPTURED_EVENT, "hipStreamWaitEvent: the event's capture has ended");
	}
	if (c->invalid) return misuse(CAPTURE_INVALIDATED, "hipStreamWaitEvent: the capture is invalid");
	if (s->capture && s->capture != c) {
		s->capture->invalid = c->invalid = 1;
		return misuse(CAPTURE_MERGE, "hipStreamWaitEvent: the event is of another capture");
	}
	if (!s->capture) {
		s->capture = c;
		s->position = s->joined = 0;
	}
	if (e->from != s && e->from->joined < e->position) e->from->joined = e->position;
	s->position++;
	return SUCCESS;
}

DEVICE_API(hipStreamWaitEvent, (void *h, void *ev, unsigned flags), (h, ev, flags)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	struct event *e = find_event(ev);
	if (!e) return INVALID_HANDLE;
	if (flags) return misuse(INVALID_VALUE, "hipStreamWaitEvent: flags");
	if (e->capture) return wait_captured(s, e);
	if (!e->mark) return SUCCESS;
	if (s->capture) {
		s->capture->invalid = 1;
		return misuse(CAPTURE_ISOLATION, "hipStreamWaitEvent: a captured stream waits for work outside of the capture");
	}
	e->mark->refs++;
	return enqueue(s, (struct op){ .what = WAIT, .mark = e->mark });
}

#ifndef HIPSIM_NO_OPTIONAL
#ifndef HIPSIM_NO_R0600 /* HIP 5.2 lacks it */
DEVICE_API(hipStreamGetDevice, (void *h, int *dev), (h, dev)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	if (!dev) return misuse(INVALID_VALUE, "hipStreamGetDevice: null pointer");
	*dev = s->dev;
	return SUCCESS;
}
#endif

DEVICE_API(hipStreamGetFlags, (void *h, unsigned *flags), (h, flags)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	if (!flags) return misuse(INVALID_VALUE, "hipStreamGetFlags: null pointer");
	*flags = s->flags;
	return SUCCESS;
}
#endif

/* ---- events ---- */

DEVICE_API(hipEventCreateWithFlags, (void **out, unsigned flags), (out, flags)) {
	if (!out || (flags & ~(unsigned)(EVENT_BLOCKING | EVENT_NO_TIMING | EVENT_INTERPROCESS)))
		return misuse(INVALID_VALUE, "hipEventCreateWithFlags: flags");
	if ((flags & EVENT_INTERPROCESS) && !(flags & EVENT_NO_TIMING))
		return misuse(INVALID_VALUE, "hipEventCreateWithFlags: interprocess with timing");
	struct event *e = calloc(1, sizeof *e);
	e->dev = current;
	e->live = 1;
	e->flags = flags;
	e->next = events;
	events = e;
	add(S_EVENTS, 1);
	*out = e;
	return SUCCESS;
}

DEVICE_API(hipEventDestroy, (void *h), (h)) {
	struct event *e = find_event(h);
	if (!e) return h ? CONTEXT_DESTROYED : INVALID_HANDLE;
	e->live = 0;
	unref(e->mark);
	e->mark = NULL;
	add(S_EVENTS, -1);
	return SUCCESS;
}

DEVICE_API(hipEventRecord, (void *h, void *stream), (h, stream)) {
	struct stream *s = find_stream(stream);
	if (!s) return CONTEXT_DESTROYED;
	struct event *e = find_event(h);
	if (!e) return INVALID_HANDLE;
	if (e->dev != s->dev) return misuse(INVALID_HANDLE, "hipEventRecord: event and stream of different devices");
	unref(e->mark);
	e->mark = NULL;
	e->capture = s->capture ? s->capture->number : 0;
	if (s->capture) {
		if (s->capture->invalid) return misuse(CAPTURE_INVALIDATED, "hipEventRecord: the capture is invalid");
		e->from = s;
		e->position = s->position;
		return SUCCESS;
	}
	e->mark = calloc(1, sizeof *e->mark);
	e->mark->refs = 2; /* the event's and the queue's */
	return enqueue(s, (struct op){ .what = RECORD, .mark = e->mark });
}

/* not_captured_event returns 907 for an event that stands for captured work, which nobody can wait for or ask after. */
static int not_captured_event(struct event *e) {
	if (!e->capture) return SUCCESS;
	struct capture *c = e->from->live ? e->from->capture : NULL;
	if (c && c->number == e->capture) c->invalid = 1;
	return misuse(CAPTURED_EVENT, "the event was last recorded in a capture");
}

DEVICE_API(hipEventQuery, (void *h), (h)) {
	struct event *e = find_event(h);
	if (!e) return INVALID_HANDLE;
	int code = not_captured_event(e);
	return code ? code : !e->mark ? SUCCESS : e->mark->done ? e->mark->code : NOT_READY;
}

DEVICE_API(hipEventSynchronize, (void *h), (h)) {
	struct event *e = find_event(h);
	if (!e) return INVALID_HANDLE;
	int code = not_captured_event(e);
	struct mark *m = e->mark;
	if (code || !m) return code;
	m->refs++;
	while (!m->done) pthread_cond_wait(&changed, &lock);
	code = m->code;
	unref(m);
	return code;
}

DEVICE_API(hipEventElapsedTime, (float *ms, void *start, void *stop), (ms, start, stop)) {
	struct event *a = find_event(start), *b = find_event(stop);
	if (!a || !b) return INVALID_HANDLE;
	if (!ms) return misuse(INVALID_VALUE, "hipEventElapsedTime: null pointer");
	int code = not_captured_event(a);
	if (!code) code = not_captured_event(b);
	if (code) return code;
	if (!a->mark || !b->mark || ((a->flags | b->flags) & EVENT_NO_TIMING) || a->dev != b->dev)
		return misuse(INVALID_HANDLE, "hipEventElapsedTime: not recorded, without timing, or of different devices");
	if (!a->mark->done || !b->mark->done) return NOT_READY;
	*ms = (b->mark->at.tv_sec - a->mark->at.tv_sec) * 1e3f + (b->mark->at.tv_nsec - a->mark->at.tv_nsec) / 1e6f;
	return SUCCESS;
}

