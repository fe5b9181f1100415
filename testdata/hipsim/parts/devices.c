/* Versions, devices, and access between devices. */

static int version(int *v) {
	if (!v) return misuse(INVALID_VALUE, "null pointer for the version");
	*v = cfg.version == HIP_5_2 ? 50221153 : cfg.version == HIP_5_7 ? 50731921
		: cfg.version == HIP_6_4 ? 60443484 : 70253211;
	return SUCCESS;
}

API(hipRuntimeGetVersion, (int *v), (v)) { return version(v); }

API(hipDriverGetVersion, (int *v), (v)) { return version(v); }

API(hipGetDeviceCount, (int *n), (n)) {
	if (!n) return misuse(INVALID_VALUE, "null pointer for the count");
	*n = cfg.devices;
	return cfg.devices ? SUCCESS : NO_DEVICE;
}

static int no_such(int dev) { return dev < 0 || dev >= cfg.devices; }

DEVICE_API(hipSetDevice, (int dev), (dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipSetDevice");
	current = dev;
	return SUCCESS;
}

DEVICE_API(hipGetDevice, (int *dev), (dev)) {
	if (!dev) return misuse(INVALID_VALUE, "hipGetDevice: null pointer");
	*dev = current;
	return SUCCESS;
}

DEVICE_API(hipDeviceGetName, (char *name, int len, int dev), (name, len, dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipDeviceGetName");
	if (!name || len <= 0) return misuse(INVALID_VALUE, "hipDeviceGetName: no room");
	snprintf(name, len, "Simulated GPU %d", dev);
	return SUCCESS;
}

DEVICE_API(hipDeviceGetPCIBusId, (char *id, int len, int dev), (id, len, dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipDeviceGetPCIBusId");
	if (!id || len <= 0) return misuse(INVALID_VALUE, "hipDeviceGetPCIBusId: no room");
	snprintf(id, len, "%04x:%02x:%02x.%x", 0, 0xc1 + dev, 0, 0);
	return len <= 12 ? misuse(INVALID_VALUE, "hipDeviceGetPCIBusId: truncated") : SUCCESS;
}

DEVICE_API(hipDeviceGetAttribute, (int *v, int attr, int dev), (v, attr, dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipDeviceGetAttribute");
	if (!v) return misuse(INVALID_VALUE, "hipDeviceGetAttribute: null pointer");
	switch (attr) {
	case 2: *v = 8; return SUCCESS;               /* asynchronous engines: AMD's constant */
	case 3: *v = 1; return SUCCESS;               /* can map host memory */
	case 16: *v = cfg.integrated; return SUCCESS;
	case 63: *v = 104; return SUCCESS;            /* multiprocessors */
	case 67: *v = 0xc1 + dev; return SUCCESS;     /* PCI bus */
	case 68: case 69: *v = 0; return SUCCESS;     /* PCI device, domain */
	case 87: *v = 64; return SUCCESS;             /* warp size */
	case 88: *v = 1; return SUCCESS;              /* memory pools */
	case 89:                                      /* virtual memory; HIP 5.2 does not know it */
		if (cfg.version < HIP_5_7) return INVALID_VALUE;
		*v = cfg.virtual_memory;
		return SUCCESS;
	}
	return misuse(INVALID_VALUE, "hipDeviceGetAttribute: unknown attribute");
}

DEVICE_API(hipDeviceTotalMem, (size_t *n, int dev), (n, dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipDeviceTotalMem");
	if (!n) return misuse(INVALID_VALUE, "hipDeviceTotalMem: null pointer");
	*n = cfg.memory;
	return SUCCESS;
}

DEVICE_API(hipMemGetInfo, (size_t *free_bytes, size_t *total), (free_bytes, total)) {
	settle();
	if (free_bytes) *free_bytes = cfg.memory - used[current];
	if (total) *total = cfg.memory;
	return SUCCESS;
}

DEVICE_API(hipDeviceSynchronize, (void), ()) {
	NO_CAPTURE();
	return drain_device(current);
}

#ifndef HIPSIM_NO_OPTIONAL
/* properties fills a hipDeviceProp_t of the given layout; not one byte more than its size is touched. */
static int properties(char *p, int dev, size_t size, int memory, int integrated, int arch) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipGetDeviceProperties");
	if (!p) return misuse(INVALID_VALUE, "hipGetDeviceProperties: null pointer");
	memset(p, 0, size);
	snprintf(p, 256, "Simulated GPU %d", dev);
	memcpy(p + memory, &cfg.memory, sizeof cfg.memory);
	memcpy(p + integrated, &cfg.integrated, sizeof cfg.integrated);
	snprintf(p + arch, 256, ARCH);
	return SUCCESS;
}

DEVICE_API(hipGetDeviceProperties, (char *p, int dev), (p, dev)) { return properties(p, dev, 792, 256, 652, 396); }

#ifndef HIPSIM_NO_R0600
DEVICE_API(hipGetDevicePropertiesR0600, (char *p, int dev),
	(p, dev)) {
	return properties(p, dev, 1472, 288, 396, 1160);
}
#endif

DEVICE_API(hipDeviceGetUuid, (char *uuid, int dev), (uuid, dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipDeviceGetUuid");
	char text[17];
	snprintf(text, sizeof text, "%016x", 0xabc0 + dev);
	memcpy(uuid, text, 16);
	return SUCCESS;
}

DEVICE_API(hipDeviceCanAccessPeer, (int *can, int dev, int peer), (can, dev, peer)) {
	if (no_such(dev) || no_such(peer)) return misuse(INVALID_DEVICE, "hipDeviceCanAccessPeer");
	*can = dev != peer;
	return SUCCESS;
}

DEVICE_API(hipDeviceEnablePeerAccess, (int peer, unsigned flags), (peer, flags)) {
	if (flags) return misuse(INVALID_VALUE, "hipDeviceEnablePeerAccess: flags");
	if (no_such(peer) || peer == current) return misuse(INVALID_DEVICE, "hipDeviceEnablePeerAccess");
	if (peers[current][peer]) return PEER_ALREADY_ENABLED;
	peers[current][peer] = 1;
	return SUCCESS;
}

DEVICE_API(hipDeviceDisablePeerAccess, (int peer), (peer)) {
	if (no_such(peer) || peer == current) return misuse(INVALID_DEVICE, "hipDeviceDisablePeerAccess");
	if (!peers[current][peer]) return PEER_NOT_ENABLED;
	peers[current][peer] = 0;
	return SUCCESS;
}
#endif

