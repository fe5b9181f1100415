/* Defects that runtimes of AMD have or had, which HIPSIM_DEFECTS turns on; README.md describes them. The parts that
 * they are in look at cfg.defects. */

enum {
	SECOND_EXPORT = 1, EARLY_CLOSE = 2, MAP_LIES = 4, MAP_HANGS = 8, HOST_ACCESS = 16, HINT_IGNORED = 32,
	HOST_ACCESS_VOID = 64, IPC_ABORTS = 128
};
static const struct { const char *name; int bit; } defects[] = {
	{"second-export", SECOND_EXPORT}, {"early-close", EARLY_CLOSE}, {"map-lies", MAP_LIES}, {"map-hangs", MAP_HANGS},
	{"host-access", HOST_ACCESS}, {"host-access-void", HOST_ACCESS_VOID}, {"hint-ignored", HINT_IGNORED},
	{"ipc-aborts", IPC_ABORTS},
};

/* parse_defects reads names of defects, separated by commas. */
static int parse_defects(const char *spec) {
	int bits = 0;
	while (*spec) {
		size_t n = strcspn(spec, ",");
		int bit = 0;
		for (size_t i = 0; i < sizeof defects / sizeof *defects; i++)
			if (strlen(defects[i].name) == n && !strncmp(defects[i].name, spec, n)) bit = defects[i].bit;
		if (!bit) return -1;
		bits |= bit;
		spec += n;
		if (*spec == ',') spec++;
	}
	cfg.defects = bits;
	return 0;
}

#ifndef HIPSIM_NO_OPTIONAL
/* lost is what hipIpcGetMemHandle does to virtual memory on AMD: it is gone until the machine starts again. Whoever
 * tries it must not go on as if it were an error like others. */
static void lost(const char *why) {
	if (!(cfg.defects & IPC_ABORTS)) return;
	fprintf(stderr, "hipsim: %s\n", why);
	abort();
}
#endif
