/* What moves: memory, processes, GPM samples and events. */
#include "box.h"
#include <stdlib.h>
#include <string.h>

typedef struct { uint64_t total, free, used; } Memory;
typedef struct { uint32_t version; uint64_t total, reserved, free, used; } Memory2;
typedef struct { uint32_t pid; uint64_t memory; uint32_t gi, ci; } ProcessFacts;
typedef struct { uint32_t pid; uint64_t at; uint32_t sm, memory, encoder, decoder; } ProcessUse;

static int belongs(const Process *p, const Gi *gi, const Ci *ci) {
    return p->pid && (!gi || (p->gi == gi->id && (!ci || p->ci == ci->id)));
}
static Ret memory(Handle h, Memory2 *to) {
    Device *d; Gi *gi; Ci *ci;
    Ret ret = any_of(h, &d, &gi, &ci);
    if (ret) return ret;
    if (!gi && d->value[V_mem_total] < 0) return (Ret)-d->value[V_mem_total];
    to->total = gi ? (uint64_t)d->profile[gi->row].memory_mib << 20 : (uint64_t)d->value[V_mem_total];
    to->reserved = gi ? 0 : (uint64_t)d->value[V_mem_reserved];
    to->used = gi ? 0 : (uint64_t)d->value[V_mem_used];
    for (int i = 0; i < PROCESSES; i++) /* compute instances share the memory of their GPU instance */
        if (belongs(&d->process[i], gi, NULL)) to->used += (uint64_t)d->process[i].memory;
    to->free = to->total - to->reserved - to->used;
    return OK;
}
EXPORT Ret nvmlDeviceGetMemoryInfo(Handle h, Memory *to) {
    ENTER(h);
    Memory2 found;
    Ret ret = memory(h, &found);
    if (!ret) *to = (Memory){found.total, found.free, found.used + found.reserved};
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetMemoryInfo_v2(Handle h, Memory2 *to) {
    ENTER(h);
    LEAVE(to->version != (sizeof *to | 2u << 24) ? VERSION : memory(h, to));
}
/* A privileged client sees every process of the parent; a MIG device shows its own. */
static Ret processes(Handle h, uint32_t mps, uint32_t *count, ProcessFacts *to) {
    Device *d; Gi *gi; Ci *ci;
    Ret ret = any_of(h, &d, &gi, &ci);
    if (ret) return ret;
    uint32_t found = 0, has = *count;
    for (int i = 0; i < PROCESSES; i++) {
        const Process *p = &d->process[i];
        if (!belongs(p, gi, ci) || p->mps != mps) continue;
        if (to && found < has) to[found] = (ProcessFacts){p->pid, (uint64_t)p->memory, p->gi, p->ci};
        found++;
    }
    *count = found;
    return found > (to ? has : 0) ? SIZE : OK;
}
EXPORT Ret nvmlDeviceGetComputeRunningProcesses_v3(Handle h, uint32_t *count, ProcessFacts *to) {
    ENTER(h);
    LEAVE(processes(h, 0, count, to));
}
EXPORT Ret nvmlDeviceGetMPSComputeRunningProcesses_v3(Handle h, uint32_t *count, ProcessFacts *to) {
    ENTER(h);
    LEAVE(processes(h, 1, count, to));
}
EXPORT Ret nvmlDeviceGetProcessUtilization(Handle h, ProcessUse *to, uint32_t *count, uint64_t since) {
    (void)since;
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret && d->value[V_mig_current] == 1) ret = NOT_SUPPORTED;
    if (ret) LEAVE(ret);
    uint32_t found = 0, has = *count;
    for (int i = 0; i < PROCESSES; i++) {
        const Process *p = &d->process[i];
        if (!p->pid) continue;
        if (to && found < has) to[found] = (ProcessUse){p->pid, (uint64_t)now_ms() * 1000, p->sm, 0, 0, 0};
        found++;
    }
    *count = found;
    LEAVE(!found ? NOT_FOUND : to && found <= has ? OK : SIZE);
}

/* GPM: two samples of the same GPU or instance, more than 100 ms apart. */
typedef struct { uint32_t device, gi, serial; int64_t at_ms; double value[GPM]; } Sample;
typedef struct { uint32_t version, supported; } Support;
typedef struct { uint32_t id; int32_t ret; double value; const char *names[3]; } Metric;
typedef struct { uint32_t version, count; Sample *first, *second; Metric metric[]; } MetricsGet;

EXPORT Ret nvmlGpmQueryDeviceSupport(Handle h, Support *to) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret && to->version != 1) ret = VERSION;
    if (!ret) to->supported = d->value[V_gpm] > 0;
    LEAVE(ret);
}
EXPORT Ret nvmlGpmSampleAlloc(Sample **to) { ENTER(0); *to = calloc(1, sizeof **to); LEAVE(*to ? OK : 20); }
EXPORT Ret nvmlGpmSampleFree(Sample *sample) { ENTER(0); free(sample); LEAVE(OK); }
EXPORT Ret nvmlGpmSampleGet(Handle h, Sample *to) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret && d->value[V_gpm] <= 0) ret = NOT_SUPPORTED;
    if (ret) LEAVE(ret);
    to->device = index_of(d), to->gi = NONE, to->serial = 0, to->at_ms = now_ms();
    memcpy(to->value, d->gpm, sizeof to->value);
    LEAVE(OK);
}
EXPORT Ret nvmlGpmMigSampleGet(Handle h, uint32_t id, Sample *to) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret && (d->value[V_gpm] <= 0 || d->value[V_mig_current] != 1)) ret = NOT_SUPPORTED;
    for (int i = 0; !ret && i < GIS; i++) {
        if (!d->gi[i].used || d->gi[i].id != id) continue;
        to->device = index_of(d), to->gi = id, to->serial = d->gi[i].serial, to->at_ms = now_ms();
        memcpy(to->value, d->gi[i].gpm, sizeof to->value);
        LEAVE(OK);
    }
    LEAVE(ret ? ret : INVALID);
}
EXPORT Ret nvmlGpmMetricsGet(MetricsGet *get) {
    ENTER(0);
    if (get->version != 1) LEAVE(VERSION);
    const Sample *a = get->first, *b = get->second;
    if (!a->at_ms || !b->at_ms || a->device != b->device || a->gi != b->gi || a->serial != b->serial ||
        b->at_ms - a->at_ms < 100)
        LEAVE(INVALID);
    for (uint32_t i = 0; i < get->count; i++) {
        Metric *m = &get->metric[i];
        m->ret = m->id < GPM ? OK : NOT_SUPPORTED;
        m->value = m->id < GPM ? (a->value[m->id] + b->value[m->id]) / 2 : 0;
    }
    LEAVE(OK);
}

/* Events: a set remembers which GPUs it listens to and where in the ring it is. */
typedef struct { uint64_t types[DEVICES]; uint32_t seen; } Set;
typedef struct { Handle device; uint64_t type, xid; uint32_t gi, ci; } Heard;

EXPORT Ret nvmlEventSetCreate(Set **to) {
    ENTER(0);
    *to = calloc(1, sizeof **to);
    if (*to) (*to)->seen = box->event_count;
    LEAVE(*to ? OK : 20);
}
EXPORT Ret nvmlEventSetFree(Set *set) { ENTER(0); free(set); LEAVE(OK); }
EXPORT Ret nvmlDeviceRegisterEvents(Handle h, uint64_t types, Set *set) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret && (types & ~(uint64_t)d->value[V_event_types])) ret = NOT_SUPPORTED;
    if (!ret) set->types[index_of(d)] |= types;
    LEAVE(ret);
}
static Ret next_event(Set *set, Heard *to) {
    while (set->seen != box->event_count) {
        const Event *e = &box->event[set->seen++ % EVENTS];
        if (!(set->types[e->device] & e->type)) continue;
        *to = (Heard){gpu_handle(e->device), e->type, e->xid, e->gi, e->ci};
        return OK;
    }
    for (uint32_t i = 0; i < box->devices; i++)
        if (set->types[i] && box->device[i].value[V_lost]) return (Ret)box->device[i].value[V_lost];
    return TIMEOUT;
}
EXPORT Ret nvmlEventSetWait_v2(Set *set, Heard *to, uint32_t timeout_ms) {
    int64_t until = 0;
    for (;;) {
        ENTER(0);
        int64_t now = now_ms();
        if (!until) until = now + timeout_ms;
        Ret ret = next_event(set, to);
        uint32_t seen = box->event_count;
        leave();
        if (ret != TIMEOUT) return ret;
        if (now >= until) return TIMEOUT;
        wait_event(seen, (int)(until - now));
    }
}
