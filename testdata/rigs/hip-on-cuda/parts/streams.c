/* Streams, events, capture and graphs. */

int hipStreamCreateWithFlags(void **s, unsigned flags) { FORWARD(cu.cuStreamCreate(s, flags & 1)); }
int hipStreamCreate(void **s) { return hipStreamCreateWithFlags(s, 0); }
int hipStreamDestroy(void *s) { FORWARD(cu.cuStreamDestroy_v2(s)); }
int hipStreamSynchronize(void *s) { FORWARD(cu.cuStreamSynchronize(s)); }
int hipStreamQuery(void *s) { FORWARD(cu.cuStreamQuery(s)); }
int hipStreamGetFlags(void *s, unsigned *flags) { FORWARD_IF(cuStreamGetFlags, cu.cuStreamGetFlags(s, flags)); }

int hipStreamWaitEvent(void *s, void *e, unsigned flags) {
	(void)flags;
	FORWARD(cu.cuStreamWaitEvent(s, e, 0));
}

/* A stream belongs to a context, and that to a device. */
int hipStreamGetDevice(void *s, int *d) {
	CUctx of = NULL;
	int code = ready();
	if (!code) code = cu.cuStreamGetCtx ? cu.cuStreamGetCtx(s, &of) : NOT_SUPPORTED;
	if (!code) code = cu.cuCtxSetCurrent(of);
	if (code) return result(code);
	code = cu.cuCtxGetDevice(d);
	int back = cu.cuCtxSetCurrent(contexts[current]);
	return result(code ? code : back);
}

int hipEventCreateWithFlags(void **e, unsigned flags) { FORWARD(cu.cuEventCreate(e, flags & 3)); }
int hipEventCreate(void **e) { return hipEventCreateWithFlags(e, 0); }
int hipEventDestroy(void *e) { FORWARD(cu.cuEventDestroy_v2(e)); }
int hipEventRecord(void *e, void *s) { FORWARD(cu.cuEventRecord(e, s)); }
int hipEventQuery(void *e) { FORWARD(cu.cuEventQuery(e)); }
int hipEventSynchronize(void *e) { FORWARD(cu.cuEventSynchronize(e)); }
int hipEventElapsedTime(float *ms, void *a, void *b) { FORWARD(cu.cuEventElapsedTime(ms, a, b)); }

/* Modes of capture (0 global, 1 thread, 2 relaxed), states (0 none, 1 active, 2 invalid) and codes (900 to 908) are
 * CUDA's. */
int hipStreamBeginCapture(void *s, int mode) {
	FORWARD_IF(cuStreamBeginCapture_v2, cu.cuStreamBeginCapture_v2(s, mode));
}

int hipStreamEndCapture(void *s, void **graph) { FORWARD_IF(cuStreamEndCapture, cu.cuStreamEndCapture(s, graph)); }
int hipStreamIsCapturing(void *s, int *state) { FORWARD_IF(cuStreamIsCapturing, cu.cuStreamIsCapturing(s, state)); }

/* Since CUDA 11.4 the driver no longer says which node is at fault. */
int hipGraphInstantiate(void **exec, void *graph, void **node, char *text, size_t n) {
	if (!cu.cuGraphInstantiateWithFlags)
		FORWARD_IF(cuGraphInstantiate_v2, cu.cuGraphInstantiate_v2(exec, graph, node, text, n));
	if (node) *node = NULL;
	if (text && n) *text = 0;
	FORWARD(cu.cuGraphInstantiateWithFlags(exec, graph, 0));
}

int hipGraphLaunch(void *exec, void *s) { FORWARD_IF(cuGraphLaunch, cu.cuGraphLaunch(exec, s)); }
int hipGraphExecDestroy(void *exec) { FORWARD_IF(cuGraphExecDestroy, cu.cuGraphExecDestroy(exec)); }
int hipGraphDestroy(void *graph) { FORWARD_IF(cuGraphDestroy, cu.cuGraphDestroy(graph)); }
