/* Damage that no call reports: bits that flip in what copies deliver, and later. */

enum { MAX_FLIPS = 256 };
struct flip {
	long copies; /* how many host-to-device copies are to come, the one that is damaged included; 0: at rest */
	long rest_ms;
	unsigned long long byte;
	int bit, dev;
};
static struct flip flips[MAX_FLIPS]; /* those to come */
static int nflips, flipper_runs;
static long long touched[MAX_DEVICES]; /* when something was last allocated or copied there, in milliseconds; 0: never */

static long long now_ms(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* touch notes that something was allocated on the device or copied there. */
static void touch(int dev) { touched[dev] = now_ms(); }

/* flip flips a bit of the n bytes of a range from at on. Device memory is written through its file, whatever access
 * anybody has to it. */
static void flip(struct range *r, size_t at, size_t n, const struct flip *f) {
	at += f->byte % n;
	char v;
	if (!on_device(r)) r->data[at] ^= (char)(1 << f->bit);
	else if (pread(r->fd, &v, 1, at) != 1 || (v ^= (char)(1 << f->bit), pwrite(r->fd, &v, 1, at) != 1)) abort();
	add(S_FLIPS, 1);
}

static void drop_flip(int i) { flips[i] = flips[--nflips]; }

/* delivered is called when a copy from the host has written n bytes of device memory, at bytes behind its beginning. */
static void delivered(struct range *r, size_t at, size_t n) {
	touch(r->dev);
	for (int i = nflips - 1; i >= 0; i--) {
		if (!flips[i].copies || --flips[i].copies) continue;
		flip(r, at, n, &flips[i]);
		drop_flip(i);
	}
}

/* largest returns the largest piece of the device's memory; of an APU that is page-locked memory. */
static struct range *largest(int dev) {
	struct range *most = NULL;
	for (struct range *r = ranges; r; r = r->next)
		if (r->dev == dev && !r->ipc && (on_device(r) || cfg.integrated) && (!most || r->size > most->size)) most = r;
	return most;
}

/* flipper is a thread that flips the bits of memory at rest. It ends when there is nothing left to do. */
static void *flipper(void *arg) {
	(void)arg;
	pthread_mutex_lock(&lock);
	for (;;) {
		int waiting = 0;
		for (int i = nflips - 1; i >= 0; i--) {
			struct flip *f = &flips[i];
			if (f->copies) continue;
			struct range *r = touched[f->dev] && now_ms() - touched[f->dev] >= f->rest_ms ? largest(f->dev) : NULL;
			if (!r) { waiting = 1; continue; }
			flip(r, 0, r->size, f);
			drop_flip(i);
		}
		if (!waiting) break;
		pthread_mutex_unlock(&lock);
		usleep(1000);
		pthread_mutex_lock(&lock);
	}
	flipper_runs = 0;
	pthread_mutex_unlock(&lock);
	return NULL;
}

/* parse_flips reads "N:BYTE:BIT" and "TIMEms:BYTE:BIT[:DEVICE]", separated by commas, in place of what is still to
 * come. */
static int parse_flips(const char *spec) {
	nflips = 0;
	int resting = 0;
	while (*spec) {
		struct flip f = {0};
		char *end;
		int used = 0;
		if (nflips == MAX_FLIPS) return -1;
		long when = strtol(spec, &end, 10);
		if (end == spec || when < 1) return -1;
		if (!strncmp(end, "ms", 2)) { f.rest_ms = when; end += 2; resting = 1; }
		else f.copies = when;
		if (sscanf(end, ":%llu:%d%n", &f.byte, &f.bit, &used) != 2) return -1;
		spec = end + used;
		if (f.rest_ms && *spec == ':') {
			if (sscanf(spec, ":%d%n", &f.dev, &used) != 1) return -1;
			spec += used;
		}
		if (f.bit < 0 || f.bit > 7 || f.dev < 0 || f.dev >= MAX_DEVICES) return -1;
		flips[nflips++] = f;
		if (*spec == ',') spec++;
		else if (*spec) return -1;
	}
	pthread_t thread;
	if (!resting || flipper_runs) return 0;
	if (pthread_create(&thread, NULL, flipper, NULL)) return -1;
	pthread_detach(thread);
	flipper_runs = 1;
	return 0;
}
