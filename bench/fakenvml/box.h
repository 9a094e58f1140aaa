/* The state of a make-believe machine with GPUs: one file, mapped by every process that loads the library.
 *
 * Nothing here says which GPUs or MIG profiles exist; box.py fills that in, from the project's geometry table.
 * A value below zero is an NVML error code with its sign turned: reading power_mw = -3 answers NOT_SUPPORTED. */
#ifndef BOX_H
#define BOX_H
#include <pthread.h>
#include <stdint.h>

typedef int Ret;
typedef uint64_t Handle; /* tag, device, slots and a serial number packed: a stale one is recognised */

enum {
    OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, SIZE = 7,
    NO_DRIVER = 9, TIMEOUT = 10, LOST = 15, RESET_REQUIRED = 16, IN_USE = 19, FULL = 23, VERSION = 25, UNKNOWN = 999
};
enum { DEVICES = 16, GIS = 14, CIS = 8, PROFILES = 18, PROCESSES = 128, EVENTS = 256, FAULTS = 32, TRACE = 1024, STARTS = 8, GPM = 64 };
enum { GPU_TAG = 1, MIG_TAG = 2, GI_TAG = 3, CI_TAG = 4 };
#define NONE 0xFFFFFFFFu

#define VALUES(X) \
    X(lost) X(util_gpu) X(util_mem) X(util_enc) X(util_dec) X(mem_total) X(mem_reserved) X(mem_used) \
    X(power_mw) X(power_limit_mw) X(energy_mj) X(temp_gpu) X(temp_mem) X(temp_shutdown) X(temp_slowdown) \
    X(clock_sm) X(clock_mem) X(clock_max_sm) X(clock_max_mem) X(throttle) X(pstate) X(pcie_tx_kib) X(pcie_rx_kib) \
    X(pcie_gen) X(pcie_gen_max) X(pcie_width) X(pcie_width_max) X(pcie_replay) X(ecc_mode) X(ecc_pending) \
    X(ecc_corrected) X(ecc_uncorrected) X(ecc_corrected_total) X(ecc_uncorrected_total) \
    X(remap_corrected) X(remap_uncorrected) X(remap_pending) X(remap_failed) X(retired_sbe) X(retired_dbe) \
    X(recovery) X(numa) X(minor) X(nvlinks) X(nvlink_down) X(nvlink_switch) X(nvlink_tx_kib) X(nvlink_rx_kib) \
    X(persistence) X(gpm) X(mig_capable) X(mig_needs_reset) X(mig_current) X(mig_pending) X(clients) \
    X(violation_power_ns) X(violation_thermal_ns) X(event_types) X(driver_mismatch)

enum Value {
#define X(name) V_##name,
    VALUES(X)
#undef X
    VALUE_COUNT
};

typedef struct {
    int32_t known, id, g, size, max, dec, ofa, sm, starts, start[STARTS];
    int64_t memory_mib;
    char name[96];
} Profile;

typedef struct {
    uint32_t used, id, profile, start, g, serial;
    char uuid[80];
} Ci;

typedef struct {
    uint32_t used, id, row, start, serial;
    Ci ci[CIS];
    double gpm[GPM];
} Gi;

typedef struct { uint32_t pid, gi, ci, sm, mps; int64_t memory; } Process;

typedef struct {
    char name[96], uuid[80], serial[32], vbios[32], bus[32];
    uint32_t pci_id, bus_number, arch, major, minor, mem_slices, compute_slices, dec, ofa;
    int64_t value[VALUE_COUNT];
    Profile profile[PROFILES]; /* by NVML's enumeration */
    Gi gi[GIS];
    Process process[PROCESSES];
    double gpm[GPM];
} Device;

typedef struct { uint32_t device, gi, ci; uint64_t type, xid; } Event;
typedef struct { char call[64]; int32_t device, from, times, code, sleep_ms, die, late, seen; } Fault;

typedef struct {
    pthread_mutex_t lock;
    uint32_t boot, devices, serial, unprivileged, event_count, calls;
    int64_t clock_ms; /* moved by tests, added to the real one */
    char driver[32];
    Device device[DEVICES];
    Event event[EVENTS];
    Fault fault[FAULTS];
    char called[TRACE][56]; /* names of the last calls */
} Box;

extern Box *box;
extern uint32_t booted; /* the boot this process was initialised in */

Ret enter(const char *call, Handle handle); /* initialised? then any planned fault of this call */
void leave(void);
Ret told(Ret ret); /* what is answered after all: a late fault strikes when the work is done */
void hold(void); /* lock without the checks, for controls */
int64_t now_ms(void);
void wake(void);
int wait_event(uint32_t seen, int timeout_ms); /* 0 = something was pushed */

uint32_t tag(Handle h);
Ret gpu_of(Handle h, Device **device); /* a whole GPU that is not lost */
Ret any_of(Handle h, Device **device, Gi **gi, Ci **ci); /* a GPU (gi NULL) or a MIG device */
Handle gpu_handle(uint32_t index);
Handle part_handle(uint32_t kind, uint32_t device, uint32_t gi, uint32_t ci, uint32_t serial);
uint32_t index_of(const Device *device);
void forget_instances(Device *device);

#define ENTER(handle) \
    do { Ret entered = enter(__func__, (Handle)(handle)); if (entered) return entered; } while (0)
#define LEAVE(ret) do { Ret left = told(ret); leave(); return left; } while (0)
#define EXPORT __attribute__((visibility("default")))
#endif
