/* The mapped state, its lock, planned faults, and the controls that tests call. */
#define _GNU_SOURCE
#include "box.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

Box *box;
uint32_t booted;

static const char *const value_names[] = {
#define X(name) #name,
    VALUES(X)
#undef X
};

static int map(const char *path, int flags) {
    int file = open(path, flags, 0600);
    if (file < 0) return -1;
    if ((flags & O_CREAT) && ftruncate(file, sizeof(Box))) { close(file); return -1; }
    void *at = mmap(NULL, sizeof(Box), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (at == MAP_FAILED) return -1;
    if (box) munmap(box, sizeof(Box));
    box = at;
    return 0;
}

void hold(void) {
    if (pthread_mutex_lock(&box->lock) == EOWNERDEAD) pthread_mutex_consistent(&box->lock);
}
void leave(void) { pthread_mutex_unlock(&box->lock); }

int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000LL + t.tv_nsec / 1000000 + box->clock_ms;
}

void wake(void) { syscall(SYS_futex, &box->event_count, FUTEX_WAKE, 1 << 30, NULL, NULL, 0); }

int wait_event(uint32_t seen, int timeout_ms) {
    struct timespec t = {timeout_ms / 1000, (timeout_ms % 1000) * 1000000L};
    if (box->event_count != seen) return 0;
    syscall(SYS_futex, &box->event_count, FUTEX_WAIT, seen, &t, NULL, 0);
    return box->event_count == seen;
}

static Fault *planned(const char *call, Handle handle) {
    uint32_t device = (handle >> 48) & 0xFF;
    for (int i = 0; i < FAULTS; i++) {
        Fault *fault = &box->fault[i];
        if (strcmp(fault->call, call) && strcmp(fault->call, "*")) continue;
        if (!*fault->call || (fault->device >= 0 && (!handle || (uint32_t)fault->device != device))) continue;
        fault->seen++;
        if (fault->seen >= fault->from && fault->seen < fault->from + fault->times) return fault;
    }
    return NULL;
}

static __thread int late_code, late_death;
Ret told(Ret ret) {
    if (late_death) { leave(); kill(getpid(), SIGKILL); }
    return late_code ? late_code : ret;
}

/* Locks and stays locked when it returns OK. */
Ret enter(const char *call, Handle handle) {
    int starting = !strcmp(call, "nvmlInitWithFlags");
    if (!box) {
        const char *path = getenv("FAKENVML_STATE");
        if (!path || map(path, O_RDWR)) return starting ? NO_DRIVER : UNINITIALIZED;
    }
    hold();
    snprintf(box->called[box->calls++ % TRACE], sizeof box->called[0], "%s", call);
    late_code = late_death = 0;
    Fault *fault = planned(call, handle);
    if (fault) {
        int code = fault->code, sleep_ms = fault->sleep_ms, die = fault->die;
        if (fault->late) { late_code = code, late_death = die, code = die = 0; }
        leave();
        if (sleep_ms) { struct timespec t = {sleep_ms / 1000, (sleep_ms % 1000) * 1000000L}; nanosleep(&t, NULL); }
        if (die) kill(getpid(), SIGKILL);
        if (code) return code;
        hold();
    }
    if (!starting && booted != box->boot) { leave(); return UNINITIALIZED; }
    return OK;
}

uint32_t tag(Handle h) { return h >> 56; }
uint32_t index_of(const Device *device) { return (uint32_t)(device - box->device); }
Handle part_handle(uint32_t kind, uint32_t device, uint32_t gi, uint32_t ci, uint32_t serial) {
    return ((Handle)kind << 56) | ((Handle)device << 48) | ((Handle)gi << 40) | ((Handle)ci << 32) | serial;
}
Handle gpu_handle(uint32_t index) { return part_handle(GPU_TAG, index, 0, 0, 0x1000 + index); }

Ret any_of(Handle h, Device **device, Gi **gi, Ci **ci) {
    uint32_t index = (h >> 48) & 0xFF, g = (h >> 40) & 0xFF, c = (h >> 32) & 0xFF, serial = (uint32_t)h;
    *gi = NULL, *ci = NULL;
    if (!tag(h) || tag(h) > CI_TAG || index >= box->devices || g >= GIS || c >= CIS) return INVALID;
    *device = &box->device[index];
    if ((*device)->value[V_lost]) return (Ret)(*device)->value[V_lost];
    if (tag(h) == GPU_TAG) return OK;
    *gi = &(*device)->gi[g];
    if (!(*gi)->used || (tag(h) == GI_TAG && (*gi)->serial != serial)) return INVALID;
    if (tag(h) == GI_TAG) return OK;
    *ci = &(*gi)->ci[c];
    return (*ci)->used && (*ci)->serial == serial ? OK : INVALID;
}

Ret gpu_of(Handle h, Device **device) {
    Gi *gi; Ci *ci;
    Ret ret = any_of(h, device, &gi, &ci);
    return ret ? ret : gi ? NOT_SUPPORTED : OK;
}

void forget_instances(Device *device) {
    memset(device->gi, 0, sizeof device->gi);
    memset(device->process, 0, sizeof device->process);
}

/* Controls. */
EXPORT int fake_create(const char *path, const char *driver) {
    unlink(path);
    if (map(path, O_RDWR | O_CREAT)) return -1;
    pthread_mutexattr_t how;
    pthread_mutexattr_init(&how);
    pthread_mutexattr_setpshared(&how, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&how, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&box->lock, &how);
    box->boot = 1;
    booted = 0;
    snprintf(box->driver, sizeof box->driver, "%s", driver);
    return 0;
}

EXPORT int fake_device(const char *name, const char *uuid, const char *serial, const char *bus, uint32_t bus_number,
                       uint32_t pci_id, uint32_t arch, uint32_t major, uint32_t minor, uint32_t mem_slices,
                       uint32_t compute_slices, uint32_t dec, uint32_t ofa) {
    if (box->devices >= DEVICES) return -1;
    Device *d = &box->device[box->devices];
    snprintf(d->name, sizeof d->name, "%s", name);
    snprintf(d->uuid, sizeof d->uuid, "%s", uuid);
    snprintf(d->serial, sizeof d->serial, "%s", serial);
    snprintf(d->vbios, sizeof d->vbios, "96.00.%02X", box->devices);
    snprintf(d->bus, sizeof d->bus, "%s", bus);
    d->bus_number = bus_number, d->pci_id = pci_id, d->arch = arch, d->major = major, d->minor = minor;
    d->mem_slices = mem_slices, d->compute_slices = compute_slices, d->dec = dec, d->ofa = ofa;
    return (int)box->devices++;
}

EXPORT int fake_profile(uint32_t device, uint32_t row, const char *name, int32_t id, int32_t g, int32_t size,
                        int32_t max, int32_t dec, int32_t ofa, int32_t sm, int64_t memory_mib, int32_t starts,
                        const int32_t *start) {
    if (device >= box->devices || row >= PROFILES || starts > STARTS) return -1;
    Profile *p = &box->device[device].profile[row];
    *p = (Profile){.known = 1, .id = id, .g = g, .size = size, .max = max, .dec = dec, .ofa = ofa, .sm = sm,
                   .starts = starts, .memory_mib = memory_mib};
    memcpy(p->start, start, (size_t)starts * sizeof *start);
    snprintf(p->name, sizeof p->name, "%s", name);
    return 0;
}

static int find_value(const char *name) {
    for (int i = 0; i < VALUE_COUNT; i++) if (!strcmp(value_names[i], name)) return i;
    return -1;
}
EXPORT int fake_set(uint32_t device, const char *name, int64_t value) {
    int at = find_value(name);
    if (at < 0 || device >= box->devices) return -1;
    hold();
    box->device[device].value[at] = value;
    leave();
    if (at == V_lost) { __atomic_add_fetch(&box->event_count, 0, __ATOMIC_SEQ_CST); wake(); }
    return 0;
}
EXPORT int64_t fake_get(uint32_t device, const char *name) {
    int at = find_value(name);
    return at < 0 || device >= box->devices ? INT64_MIN : box->device[device].value[at];
}

/* A process on a GPU or on one instance of it (gi, ci; 0xFFFFFFFF = none); memory < 0 removes it. */
EXPORT int fake_process(uint32_t device, uint32_t pid, int64_t memory, uint32_t gi, uint32_t ci, uint32_t sm,
                        uint32_t mps) {
    if (device >= box->devices) return -1;
    hold();
    Process *p = box->device[device].process, *at = NULL;
    for (int i = 0; i < PROCESSES; i++)
        if (p[i].pid == pid && p[i].gi == gi && p[i].ci == ci) { at = &p[i]; break; }
    for (int i = 0; !at && memory >= 0 && i < PROCESSES; i++) if (!p[i].pid) at = &p[i];
    if (at) *at = memory < 0 ? (Process){0} : (Process){pid, gi, ci, sm, mps, memory};
    leave();
    return at ? 0 : -1;
}

EXPORT int fake_gpm(uint32_t device, uint32_t gi, uint32_t metric, double value) {
    if (device >= box->devices || metric >= GPM) return -1;
    int found = -1;
    hold();
    Device *d = &box->device[device];
    if (gi == NONE) { d->gpm[metric] = value; found = 0; }
    for (int i = 0; i < GIS; i++)
        if (d->gi[i].used && d->gi[i].id == gi) { d->gi[i].gpm[metric] = value; found = 0; }
    leave();
    return found;
}

EXPORT void fake_event(uint32_t device, uint64_t type, uint64_t xid, uint32_t gi, uint32_t ci) {
    hold();
    box->event[box->event_count % EVENTS] = (Event){device, gi, ci, type, xid};
    __atomic_add_fetch(&box->event_count, 1, __ATOMIC_SEQ_CST);
    leave();
    wake();
}

/* From its nth call on, `times` times: sleep, then die, or answer `code` (0 = go on as usual); late = when the work is
 * done. "*" = every call. */
EXPORT int fake_fault(const char *call, int32_t device, int32_t from, int32_t times, int32_t code, int32_t sleep_ms,
                      int32_t die, int32_t late) {
    int placed = -1;
    hold();
    for (int i = 0; i < FAULTS && placed < 0; i++) {
        Fault *f = &box->fault[i];
        if (*f->call) continue;
        snprintf(f->call, sizeof f->call, "%s", call);
        f->device = device, f->from = from, f->times = times, f->code = code, f->sleep_ms = sleep_ms, f->die = die, f->late = late;
        f->seen = 0, placed = i;
    }
    leave();
    return placed;
}
EXPORT void fake_heal(void) { hold(); memset(box->fault, 0, sizeof box->fault); leave(); }
EXPORT uint32_t fake_calls(void) { return box->calls; }
EXPORT const char *fake_called(uint32_t call) { return box->called[call % TRACE]; }
EXPORT void fake_tick(int64_t ms) { hold(); box->clock_ms += ms; leave(); }
EXPORT void fake_privileged(int yes) { box->unprivileged = !yes; }
EXPORT void fake_remove_last(void) { hold(); if (box->devices) box->devices--; leave(); }

static void reset(Device *d) {
    forget_instances(d);
    d->value[V_mig_current] = d->value[V_mig_pending];
    d->value[V_lost] = d->value[V_recovery] = d->value[V_remap_pending] = 0;
}
EXPORT void fake_reset_gpu(uint32_t device) { hold(); reset(&box->device[device]); leave(); }

/* MIG instances never survive; the mode survives where changing it takes a reset (Ampere). */
EXPORT void fake_reboot(void) {
    hold();
    for (uint32_t i = 0; i < box->devices; i++) {
        Device *d = &box->device[i];
        if (!d->value[V_mig_needs_reset]) d->value[V_mig_pending] = 0;
        reset(d);
    }
    box->boot++;
    leave();
    wake();
}
EXPORT uint32_t fake_boot(void) { return box->boot; }
EXPORT uint32_t fake_size(void) { return sizeof(Box); }
