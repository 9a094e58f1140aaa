/* MIG: mode, GPU instances, compute instances, and the handles of MIG devices. */
#include "box.h"
#include <stdio.h>
#include <string.h>

typedef struct { uint32_t start, size; } Span;
typedef struct {
    uint32_t id, p2p, slices, instances, sms, copy, decoder, encoder, jpeg, ofa;
    uint64_t memory_mib;
} GiProfile;
typedef struct {
    uint32_t version, id, p2p, slices, instances, sms, copy, decoder, encoder, jpeg, ofa;
    uint64_t memory_mib;
    char name[96];
} GiProfile2;
typedef struct { Handle device; uint32_t id, profile; Span at; } GiFacts;
typedef struct { Handle device, gi; uint32_t id, profile; Span at; } CiFacts;
typedef struct { uint32_t id, slices, instances, sms, copy, decoder, encoder, jpeg, ofa; } CiProfile;
typedef struct { uint32_t version; CiProfile body; char name[96]; } CiProfile2;
static const uint32_t ci_slices[] = {1, 2, 3, 4, 7, 8, 6, 1};

static Ret divided(Handle h, Device **d) { /* a GPU with MIG on */
    Ret ret = gpu_of(h, d);
    return ret ? ret : (*d)->value[V_mig_current] == 1 ? OK : NOT_SUPPORTED;
}
static Ret allowed(void) { return box->unprivileged ? NO_PERMISSION : OK; }
static int row_of(const Device *d, uint32_t profile) {
    for (int i = 0; i < PROFILES; i++)
        if (d->profile[i].known && (uint32_t)d->profile[i].id == profile) return i;
    return -1;
}
static uint32_t bits(const Profile *p, uint32_t start) { return ((1u << p->size) - 1) << start; }

/* Whether one more of this profile may be made: slices, engines and the most there may be. */
static int room(const Device *d, int row, uint32_t start) {
    const Profile *wanted = &d->profile[row];
    uint32_t taken = 0, g = (uint32_t)wanted->g, dec = (uint32_t)wanted->dec, ofa = (uint32_t)wanted->ofa, same = 0;
    for (int i = 0; i < GIS; i++) {
        if (!d->gi[i].used) continue;
        const Profile *p = &d->profile[d->gi[i].row];
        taken |= bits(p, d->gi[i].start);
        g += (uint32_t)p->g, dec += (uint32_t)p->dec, ofa += (uint32_t)p->ofa, same += (int)d->gi[i].row == row;
    }
    return !(taken & bits(wanted, start)) && g <= d->compute_slices && dec <= d->dec && ofa <= d->ofa &&
           same < (uint32_t)wanted->max;
}
/* Opaque, as on hardware, and used again by whoever comes after: large parts low numbers, a 3g at 0 is 2, at 4 is 1. */
static uint32_t new_id(const Device *d, const Profile *p, uint32_t start) {
    uint32_t parts = d->mem_slices / (uint32_t)p->size, at = start / (uint32_t)p->size;
    uint32_t id = parts - 1 + (parts == 2 && p->g % 2 ? 1 - at : at);
    for (int i = 0; i < GIS; i++)
        if (d->gi[i].used && d->gi[i].id == id) id++, i = -1;
    return id;
}
static Ret create(Device *d, uint32_t profile, uint32_t start, Handle *to) {
    int row = row_of(d, profile), legal = 0;
    if (row < 0) return INVALID;
    for (int i = 0; i < d->profile[row].starts; i++) legal |= (uint32_t)d->profile[row].start[i] == start;
    if (!legal) return INVALID;
    if (!room(d, row, start)) return FULL;
    for (uint32_t i = 0; i < GIS; i++) {
        Gi *gi = &d->gi[i];
        if (gi->used) continue;
        uint32_t id = new_id(d, &d->profile[row], start);
        *gi = (Gi){.used = 1, .id = id, .row = (uint32_t)row, .start = start, .serial = ++box->serial};
        *to = part_handle(GI_TAG, index_of(d), i, 0, gi->serial);
        return OK;
    }
    return FULL;
}

EXPORT Ret nvmlDeviceGetMigMode(Handle h, uint32_t *current, uint32_t *pending) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret && !d->value[V_mig_capable]) ret = NOT_SUPPORTED;
    if (!ret) *current = (uint32_t)d->value[V_mig_current], *pending = (uint32_t)d->value[V_mig_pending];
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceSetMigMode(Handle h, uint32_t mode, uint32_t *status) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret) ret = !d->value[V_mig_capable] ? NOT_SUPPORTED : mode > 1 ? INVALID : allowed();
    if (ret) LEAVE(ret);
    int busy = d->value[V_clients] > 0;
    for (int i = 0; i < PROCESSES; i++) busy |= d->process[i].pid != 0;
    for (int i = 0; i < GIS; i++) busy |= !mode && d->gi[i].used;
    d->value[V_mig_pending] = mode;
    *status = OK;
    if (d->value[V_mig_current] == (int64_t)mode) LEAVE(OK);
    if (busy) *status = IN_USE;
    else if (d->value[V_mig_needs_reset]) *status = RESET_REQUIRED;
    else d->value[V_mig_current] = mode;
    LEAVE(OK);
}

static void facts(const Profile *p, GiProfile *to) {
    *to = (GiProfile){.id = (uint32_t)p->id, .slices = (uint32_t)p->g, .instances = (uint32_t)p->max,
                      .sms = (uint32_t)p->sm, .copy = (uint32_t)p->g, .decoder = (uint32_t)p->dec,
                      .encoder = 0, .jpeg = (uint32_t)p->ofa, .ofa = (uint32_t)p->ofa,
                      .memory_mib = (uint64_t)p->memory_mib};
}
static Ret facts2(const Profile *p, GiProfile2 *to) {
    GiProfile plain;
    if (to->version != (sizeof *to | 2u << 24)) return VERSION;
    facts(p, &plain);
    to->id = plain.id, to->p2p = 0, to->slices = plain.slices, to->instances = plain.instances, to->sms = plain.sms;
    to->copy = plain.copy, to->decoder = plain.decoder, to->encoder = 0, to->jpeg = plain.jpeg, to->ofa = plain.ofa;
    to->memory_mib = plain.memory_mib;
    memset(to->name, 0, sizeof to->name);
    snprintf(to->name, sizeof to->name, "MIG %.80s", p->name);
    return OK;
}
static Ret profile_at(Handle h, int row, Device **d) {
    Ret ret = gpu_of(h, d);
    if (!ret && !(*d)->value[V_mig_capable]) ret = NOT_SUPPORTED;
    return ret ? ret : row >= PROFILES ? INVALID : row < 0 || !(*d)->profile[row].known ? NOT_SUPPORTED : OK;
}
EXPORT Ret nvmlDeviceGetGpuInstanceProfileInfo(Handle h, uint32_t row, GiProfile *to) {
    ENTER(h);
    Device *d;
    Ret ret = profile_at(h, (int)row, &d);
    if (!ret) facts(&d->profile[row], to);
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetGpuInstanceProfileInfoV(Handle h, uint32_t row, GiProfile2 *to) {
    ENTER(h);
    Device *d;
    Ret ret = profile_at(h, (int)row, &d);
    LEAVE(ret ? ret : facts2(&d->profile[row], to));
}
EXPORT Ret nvmlDeviceGetGpuInstanceProfileInfoByIdV(Handle h, uint32_t id, GiProfile2 *to) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    int row = ret ? -1 : row_of(d, id);
    LEAVE(ret ? ret : row < 0 ? INVALID : facts2(&d->profile[row], to));
}
EXPORT Ret nvmlDeviceGetGpuInstancePossiblePlacements_v2(Handle h, uint32_t id, Span *to, uint32_t *count) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret) ret = !d->value[V_mig_capable] ? NOT_SUPPORTED : allowed();
    int row = ret ? -1 : row_of(d, id);
    if (ret || row < 0) LEAVE(ret ? ret : INVALID);
    const Profile *p = &d->profile[row];
    uint32_t has = *count;
    *count = (uint32_t)p->starts;
    if (!to) LEAVE(OK);
    if (has < *count) LEAVE(SIZE);
    for (int i = 0; i < p->starts; i++) to[i] = (Span){(uint32_t)p->start[i], (uint32_t)p->size};
    LEAVE(OK);
}
EXPORT Ret nvmlDeviceGetGpuInstanceRemainingCapacity(Handle h, uint32_t id, uint32_t *count) {
    ENTER(h);
    Device *d;
    Ret ret = divided(h, &d);
    int row = ret ? -1 : row_of(d, id);
    if (ret || row < 0) LEAVE(ret ? ret : INVALID);
    *count = 0;
    for (int i = 0; i < d->profile[row].starts; i++) *count += (uint32_t)room(d, row, (uint32_t)d->profile[row].start[i]);
    LEAVE(OK);
}
EXPORT Ret nvmlDeviceCreateGpuInstanceWithPlacement(Handle h, uint32_t id, const Span *at, Handle *to) {
    ENTER(h);
    Device *d;
    Ret ret = divided(h, &d);
    if (!ret) ret = allowed();
    if (ret) LEAVE(ret);
    int row = row_of(d, id);
    LEAVE(row < 0 || at->size != (uint32_t)d->profile[row].size ? INVALID : create(d, id, at->start, to));
}
/* Without a placement the highest free start is taken, which can dead-end as the real driver's choice can. */
EXPORT Ret nvmlDeviceCreateGpuInstance(Handle h, uint32_t id, Handle *to) {
    ENTER(h);
    Device *d;
    Ret ret = divided(h, &d);
    if (!ret) ret = allowed();
    int row = ret ? -1 : row_of(d, id);
    if (ret || row < 0) LEAVE(ret ? ret : INVALID);
    for (int i = d->profile[row].starts - 1; i >= 0; i--)
        if (create(d, id, (uint32_t)d->profile[row].start[i], to) == OK) LEAVE(OK);
    LEAVE(FULL);
}
EXPORT Ret nvmlDeviceGetGpuInstances(Handle h, uint32_t id, Handle *to, uint32_t *count) {
    ENTER(h);
    Device *d;
    Ret ret = divided(h, &d);
    if (!ret) ret = allowed();
    if (ret) LEAVE(ret);
    uint32_t found = 0, has = *count;
    for (uint32_t i = 0; i < GIS; i++) {
        if (!d->gi[i].used || (uint32_t)d->profile[d->gi[i].row].id != id) continue;
        if (to && found < has) to[found] = part_handle(GI_TAG, index_of(d), i, 0, d->gi[i].serial);
        found++;
    }
    *count = found;
    LEAVE(to && found > has ? SIZE : OK);
}
EXPORT Ret nvmlDeviceGetGpuInstanceById(Handle h, uint32_t id, Handle *to) {
    ENTER(h);
    Device *d;
    Ret ret = divided(h, &d);
    if (!ret) ret = allowed();
    for (uint32_t i = 0; !ret && i < GIS; i++)
        if (d->gi[i].used && d->gi[i].id == id) {
            *to = part_handle(GI_TAG, index_of(d), i, 0, d->gi[i].serial);
            LEAVE(OK);
        }
    LEAVE(ret ? ret : NOT_FOUND);
}

static Ret gi_of(Handle h, Device **d, Gi **gi) {
    Ci *ci;
    if (tag(h) != GI_TAG) return INVALID;
    return any_of(h, d, gi, &ci);
}
static uint32_t slot(Handle h) { return (h >> 40) & 0xFF; }
EXPORT Ret nvmlGpuInstanceGetInfo(Handle h, GiFacts *to) {
    ENTER(h);
    Device *d; Gi *gi;
    Ret ret = gi_of(h, &d, &gi);
    if (ret) LEAVE(ret);
    const Profile *p = &d->profile[gi->row];
    *to = (GiFacts){gpu_handle(index_of(d)), gi->id, (uint32_t)p->id, {gi->start, (uint32_t)p->size}};
    LEAVE(OK);
}
EXPORT Ret nvmlGpuInstanceDestroy(Handle h) {
    ENTER(h);
    Device *d; Gi *gi;
    Ret ret = gi_of(h, &d, &gi);
    if (!ret) ret = allowed();
    for (int i = 0; !ret && i < CIS; i++) if (gi->ci[i].used) ret = IN_USE;
    if (!ret) memset(gi, 0, sizeof *gi);
    LEAVE(ret);
}
static Ret ci_facts(const Device *d, const Gi *gi, uint32_t row, CiProfile *to) {
    const Profile *p = &d->profile[gi->row];
    if (row >= 8) return INVALID;
    if (row == 7 || ci_slices[row] > (uint32_t)p->g) return NOT_SUPPORTED;
    *to = (CiProfile){row, ci_slices[row], (uint32_t)p->g / ci_slices[row],
                      (uint32_t)p->sm * ci_slices[row] / (uint32_t)p->g, (uint32_t)p->g, (uint32_t)p->dec, 0,
                      (uint32_t)p->ofa, (uint32_t)p->ofa};
    return OK;
}
EXPORT Ret nvmlGpuInstanceGetComputeInstanceProfileInfo(Handle h, uint32_t row, uint32_t engine, CiProfile *to) {
    (void)engine;
    ENTER(h);
    Device *d; Gi *gi;
    Ret ret = gi_of(h, &d, &gi);
    LEAVE(ret ? ret : ci_facts(d, gi, row, to));
}
EXPORT Ret nvmlGpuInstanceGetComputeInstanceProfileInfoV(Handle h, uint32_t row, uint32_t engine, CiProfile2 *to) {
    (void)engine;
    ENTER(h);
    Device *d; Gi *gi;
    Ret ret = gi_of(h, &d, &gi);
    if (!ret && to->version != (sizeof *to | 2u << 24)) ret = VERSION;
    if (!ret) ret = ci_facts(d, gi, row, &to->body);
    if (ret) LEAVE(ret);
    const Profile *p = &d->profile[gi->row];
    memset(to->name, 0, sizeof to->name);
    if (ci_slices[row] == (uint32_t)p->g) snprintf(to->name, sizeof to->name, "MIG %.80s", p->name);
    else snprintf(to->name, sizeof to->name, "MIG %uc.%.80s", ci_slices[row], p->name);
    LEAVE(OK);
}
static Ret create_ci(Handle h, uint32_t profile, int64_t start, Handle *to) {
    Device *d; Gi *gi;
    Ret ret = gi_of(h, &d, &gi);
    if (!ret) ret = allowed();
    if (ret) return ret;
    const Profile *p = &d->profile[gi->row];
    if (profile >= 7 || ci_slices[profile] > (uint32_t)p->g) return INVALID;
    uint32_t taken = 0, size = ci_slices[profile];
    Ci *free = NULL;
    for (int i = CIS - 1; i >= 0; i--) {
        Ci *ci = &gi->ci[i];
        if (ci->used) taken |= ((1u << ci->g) - 1) << ci->start; else free = ci;
    }
    for (uint32_t at = 0; at + size <= (uint32_t)p->g; at++) {
        if ((taken & ((1u << size) - 1) << at) || (start >= 0 && at != start) || !free) continue;
        uint32_t serial = ++box->serial, index = (uint32_t)(free - gi->ci);
        *free = (Ci){1, index, profile, at, size, serial, ""};
        snprintf(free->uuid, sizeof free->uuid, "MIG-%08x-%04x-5000-8000-%012x", box->boot * 2654435761u,
                 index_of(d), serial);
        *to = part_handle(CI_TAG, index_of(d), slot(h), index, serial);
        return OK;
    }
    return FULL;
}
EXPORT Ret nvmlGpuInstanceCreateComputeInstance(Handle h, uint32_t profile, Handle *to) {
    ENTER(h);
    LEAVE(create_ci(h, profile, -1, to));
}
EXPORT Ret nvmlGpuInstanceCreateComputeInstanceWithPlacement(Handle h, uint32_t profile, const Span *at, Handle *to) {
    ENTER(h);
    LEAVE(create_ci(h, profile, at->start, to));
}
EXPORT Ret nvmlGpuInstanceGetComputeInstances(Handle h, uint32_t profile, Handle *to, uint32_t *count) {
    ENTER(h);
    Device *d; Gi *gi;
    Ret ret = gi_of(h, &d, &gi);
    uint32_t found = 0, has = *count;
    for (uint32_t i = 0; !ret && i < CIS; i++) {
        if (!gi->ci[i].used || gi->ci[i].profile != profile) continue;
        if (to && found < has) to[found] = part_handle(CI_TAG, index_of(d), slot(h), i, gi->ci[i].serial);
        found++;
    }
    if (!ret) *count = found;
    LEAVE(ret ? ret : to && found > has ? SIZE : OK);
}
EXPORT Ret nvmlGpuInstanceGetComputeInstanceById(Handle h, uint32_t id, Handle *to) {
    ENTER(h);
    Device *d; Gi *gi;
    Ret ret = gi_of(h, &d, &gi);
    for (uint32_t i = 0; !ret && i < CIS; i++)
        if (gi->ci[i].used && gi->ci[i].id == id) {
            *to = part_handle(CI_TAG, index_of(d), slot(h), i, gi->ci[i].serial);
            LEAVE(OK);
        }
    LEAVE(ret ? ret : NOT_FOUND);
}
static Ret ci_of(Handle h, Device **d, Gi **gi, Ci **ci) { return tag(h) == CI_TAG ? any_of(h, d, gi, ci) : INVALID; }
EXPORT Ret nvmlComputeInstanceGetInfo_v2(Handle h, CiFacts *to) {
    ENTER(h);
    Device *d; Gi *gi; Ci *ci;
    Ret ret = ci_of(h, &d, &gi, &ci);
    if (ret) LEAVE(ret);
    *to = (CiFacts){part_handle(MIG_TAG, index_of(d), slot(h), ci->id, ci->serial),
                    part_handle(GI_TAG, index_of(d), slot(h), 0, gi->serial), ci->id, ci->profile, {ci->start, ci->g}};
    LEAVE(OK);
}
EXPORT Ret nvmlComputeInstanceDestroy(Handle h) {
    ENTER(h);
    Device *d; Gi *gi; Ci *ci;
    Ret ret = ci_of(h, &d, &gi, &ci);
    if (!ret) ret = allowed();
    for (int i = 0; !ret && i < PROCESSES; i++)
        if (d->process[i].pid && d->process[i].gi == gi->id && d->process[i].ci == ci->id) ret = IN_USE;
    if (!ret) memset(ci, 0, sizeof *ci);
    LEAVE(ret);
}

EXPORT Ret nvmlDeviceIsMigDeviceHandle(Handle h, uint32_t *to) {
    ENTER(h);
    *to = tag(h) == MIG_TAG;
    LEAVE(OK);
}
EXPORT Ret nvmlDeviceGetMaxMigDeviceCount(Handle h, uint32_t *to) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret) *to = d->value[V_mig_capable] ? d->compute_slices : 0;
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetMigDeviceHandleByIndex(Handle h, uint32_t index, Handle *to) {
    ENTER(h);
    Device *d;
    Ret ret = divided(h, &d);
    if (!ret && index >= d->compute_slices) ret = INVALID;
    uint32_t at = 0;
    for (uint32_t g = 0; !ret && g < GIS; g++)
        for (uint32_t c = 0; d->gi[g].used && c < CIS; c++)
            if (d->gi[g].ci[c].used && at++ == index) {
                *to = part_handle(MIG_TAG, index_of(d), g, c, d->gi[g].ci[c].serial);
                LEAVE(OK);
            }
    LEAVE(ret ? ret : NOT_FOUND);
}
static Ret part_of(Handle h, Device **d, Gi **gi, Ci **ci) {
    Ret ret = any_of(h, d, gi, ci);
    return ret ? ret : tag(h) == MIG_TAG ? OK : INVALID;
}
EXPORT Ret nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Handle h, Handle *to) {
    ENTER(h);
    Device *d; Gi *gi; Ci *ci;
    Ret ret = part_of(h, &d, &gi, &ci);
    if (!ret) *to = gpu_handle(index_of(d));
    LEAVE(ret);
}
#define PART(function, expression) \
    EXPORT Ret function(Handle h, uint32_t *to) { \
        ENTER(h); \
        Device *d; Gi *gi; Ci *ci; \
        Ret ret = part_of(h, &d, &gi, &ci); \
        if (!ret) *to = (expression); \
        LEAVE(ret); \
    }
PART(nvmlDeviceGetGpuInstanceId, gi->id)
PART(nvmlDeviceGetComputeInstanceId, ci->id)
typedef struct { uint32_t sms, copy, decoder, encoder, jpeg, ofa, gi_slices, ci_slices; uint64_t memory_mib; } Attributes;
EXPORT Ret nvmlDeviceGetAttributes_v2(Handle h, Attributes *to) {
    ENTER(h);
    Device *d; Gi *gi; Ci *ci;
    Ret ret = part_of(h, &d, &gi, &ci);
    if (ret) LEAVE(ret == INVALID ? NOT_SUPPORTED : ret);
    const Profile *p = &d->profile[gi->row];
    *to = (Attributes){(uint32_t)p->sm * ci->g / (uint32_t)p->g, (uint32_t)p->g, (uint32_t)p->dec, 0,
                       (uint32_t)p->ofa, (uint32_t)p->ofa, (uint32_t)p->g, ci->g, (uint64_t)p->memory_mib};
    LEAVE(OK);
}
