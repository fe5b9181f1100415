/* The interface between the thunk and a model, version 0.4, as ROCr 7.2.4 asks for it. Facts from the header
 * libhsakmt/include/hsakmt/hsakmtmodeliface.h of ROCr; the order of the fields is what counts. */
#include <stdint.h>

enum { VERSION_MAJOR = 0, VERSION_MINOR = 4 };

struct device; /* what the thunk calls hsakmt_model */
struct queue;  /* what the thunk calls hsakmt_model_queue */

/* All addresses are the device's: offsets into the aperture. The doorbell is never set by 7.2.4, so that a model has to
 * watch the write pointer. */
struct queue_info {
	uint64_t ring, write_pointer, read_pointer;
	uint64_t *doorbell;
	uint32_t ring_size; /* in bytes */
	uint32_t type;      /* a KFD_IOC_QUEUE_TYPE: the constants below */
};

enum { QUEUE_SDMA = 1, QUEUE_COMPUTE_AQL = 2 }; /* the thunk lets no others pass */

/* Memory flags of the kernel driver (KFD_IOC_ALLOC_MEM_FLAGS) that the model looks at. */
enum { MEM_VRAM = 1 << 0, MEM_GTT = 1 << 1, MEM_DOORBELL = 1 << 3, MEM_MMIO_REMAP = 1 << 4 };

typedef void (*set_event_fn)(void *data, unsigned event);

struct functions {
	uint32_t version_major, version_minor;
	struct device *(*create)(void);
	void (*destroy)(struct device *);
	/* Device address 0 is at base in this process. */
	void (*set_global_aperture)(struct device *, void *base, uint64_t size);
	/* base is the device's address. */
	void (*alloced_memory)(struct device *, void *base, uint64_t size, uint32_t flags);
	void (*freed_memory)(struct device *, void *base, uint64_t size);
	void (*set_notify_event)(struct device *, void (*callback)(void *), void *data);
	void (*set_wait_event)(struct device *, void (*callback)(void *, uint64_t, uint64_t), void *data);
	struct queue *(*register_queue)(struct device *, struct queue_info *);
	void (*set_set_event)(struct device *, set_event_fn, void *data);
	void (*destroy_queue)(struct device *, struct queue *);
};
