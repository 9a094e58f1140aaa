/* System, identity, topology and metrics. */
#include "box.h"
#include <stdio.h>
#include <string.h>

static Ret text(char *to, uint32_t length, const char *from) {
    if (strlen(from) + 1 > length) return SIZE;
    strcpy(to, from);
    return OK;
}
/* What reads one number; a value below zero is the answer's error code. */
static Ret number(Handle h, enum Value which, int64_t *to) {
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (ret) return ret;
    if (d->value[which] < 0) return (Ret)-d->value[which];
    *to = d->value[which];
    return OK;
}
#define NUMBER(function, which, type) \
    EXPORT Ret function(Handle h, type *to) { \
        ENTER(h); \
        int64_t found = 0; \
        Ret ret = number(h, which, &found); \
        if (!ret) *to = (type)found; \
        LEAVE(ret); \
    }
#define CHOSEN(function, type, choice) \
    EXPORT Ret function(Handle h, uint32_t which, type *to) { \
        ENTER(h); \
        int64_t found = 0; \
        Ret ret = number(h, choice, &found); \
        if (!ret) *to = (type)found; \
        LEAVE(ret); \
    }
/* With MIG on, these exist for nobody. */
#define WHOLE_ONLY(h) \
    do { \
        Device *whole; \
        Ret refused = gpu_of(h, &whole); \
        if (!refused && whole->value[V_mig_current] == 1) refused = NOT_SUPPORTED; \
        if (refused) LEAVE(refused); \
    } while (0)

EXPORT Ret nvmlInitWithFlags(uint32_t flags) {
    (void)flags;
    ENTER(0);
    if (box->devices && box->device[0].value[V_driver_mismatch]) LEAVE(18);
    booted = box->boot;
    LEAVE(OK);
}
EXPORT Ret nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
EXPORT Ret nvmlShutdown(void) { ENTER(0); booted = 0; LEAVE(OK); }
EXPORT const char *nvmlErrorString(Ret code) {
    switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case SIZE: return "Insufficient Size";
    case NO_DRIVER: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case LOST: return "GPU is lost";
    case IN_USE: return "In use by another client";
    case FULL: return "Insufficient Resources";
    default: return "Unknown Error";
    }
}
EXPORT Ret nvmlSystemGetDriverVersion(char *to, uint32_t length) { ENTER(0); LEAVE(text(to, length, box->driver)); }
EXPORT Ret nvmlSystemGetNVMLVersion(char *to, uint32_t length) { ENTER(0); LEAVE(text(to, length, "13.615.71")); }
EXPORT Ret nvmlSystemGetCudaDriverVersion_v2(int *to) { ENTER(0); *to = 13040; LEAVE(OK); }

EXPORT Ret nvmlDeviceGetCount_v2(uint32_t *to) { ENTER(0); *to = box->devices; LEAVE(OK); }
EXPORT Ret nvmlDeviceGetHandleByIndex_v2(uint32_t index, Handle *to) {
    ENTER(gpu_handle(index));
    if (index >= box->devices) LEAVE(INVALID);
    *to = gpu_handle(index);
    LEAVE((Ret)box->device[index].value[V_lost]);
}
EXPORT Ret nvmlDeviceGetHandleByPciBusId_v2(const char *bus, Handle *to) {
    ENTER(0);
    for (uint32_t i = 0; i < box->devices; i++)
        if (!strcmp(box->device[i].bus, bus)) { *to = gpu_handle(i); LEAVE((Ret)box->device[i].value[V_lost]); }
    LEAVE(NOT_FOUND);
}
EXPORT Ret nvmlDeviceGetHandleByUUID(const char *uuid, Handle *to) {
    ENTER(0);
    for (uint32_t i = 0; i < box->devices; i++) {
        Device *d = &box->device[i];
        if (!strcmp(d->uuid, uuid)) { *to = gpu_handle(i); LEAVE((Ret)d->value[V_lost]); }
        for (uint32_t g = 0; g < GIS; g++)
            for (uint32_t c = 0; d->gi[g].used && c < CIS; c++) {
                Ci *ci = &d->gi[g].ci[c];
                if (!ci->used || strcmp(ci->uuid, uuid)) continue;
                *to = part_handle(MIG_TAG, i, g, c, ci->serial);
                LEAVE((Ret)d->value[V_lost]);
            }
    }
    LEAVE(NOT_FOUND);
}
EXPORT Ret nvmlDeviceGetUUID(Handle h, char *to, uint32_t length) {
    ENTER(h);
    Device *d; Gi *gi; Ci *ci;
    Ret ret = any_of(h, &d, &gi, &ci);
    LEAVE(ret ? ret : text(to, length, ci ? ci->uuid : d->uuid));
}
EXPORT Ret nvmlDeviceGetName(Handle h, char *to, uint32_t length) {
    ENTER(h);
    Device *d; Gi *gi; Ci *ci;
    Ret ret = any_of(h, &d, &gi, &ci);
    if (ret) LEAVE(ret);
    char whole[256], part[32] = "";
    if (gi && ci->g != (uint32_t)d->profile[gi->row].g) snprintf(part, sizeof part, "%uc.", ci->g);
    snprintf(whole, sizeof whole, gi ? "%s MIG %s%s" : "%s", d->name, part, gi ? d->profile[gi->row].name : "");
    LEAVE(text(to, length, whole));
}
#define TEXT(function, member) \
    EXPORT Ret function(Handle h, char *to, uint32_t length) { \
        ENTER(h); \
        Device *d; \
        Ret ret = gpu_of(h, &d); \
        LEAVE(ret ? ret : text(to, length, d->member)); \
    }
TEXT(nvmlDeviceGetSerial, serial)
TEXT(nvmlDeviceGetVbiosVersion, vbios)
#define MEMBER(function, expression) \
    EXPORT Ret function(Handle h, uint32_t *to) { \
        ENTER(h); \
        Device *d; \
        Ret ret = gpu_of(h, &d); \
        if (!ret) *to = (expression); \
        LEAVE(ret); \
    }
MEMBER(nvmlDeviceGetIndex, index_of(d))
MEMBER(nvmlDeviceGetArchitecture, d->arch)
EXPORT Ret nvmlDeviceGetCudaComputeCapability(Handle h, int *major, int *minor) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret) *major = (int)d->major, *minor = (int)d->minor;
    LEAVE(ret);
}
typedef struct { char legacy[16]; uint32_t domain, bus, device, pci_id, subsystem; char bus_id[32]; } Pci;
EXPORT Ret nvmlDeviceGetPciInfo_v3(Handle h, Pci *to) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (ret) LEAVE(ret);
    memset(to, 0, sizeof *to);
    to->bus = d->bus_number, to->pci_id = d->pci_id;
    snprintf(to->legacy, sizeof to->legacy, "0000:%02X:00.0", d->bus_number & 0xFF);
    snprintf(to->bus_id, sizeof to->bus_id, "%s", d->bus);
    LEAVE(OK);
}
NUMBER(nvmlDeviceGetMinorNumber, V_minor, uint32_t)
NUMBER(nvmlDeviceGetPersistenceMode, V_persistence, uint32_t)
NUMBER(nvmlDeviceGetNumaNodeId, V_numa, int32_t)
NUMBER(nvmlDeviceGetPowerUsage, V_power_mw, uint32_t)
NUMBER(nvmlDeviceGetEnforcedPowerLimit, V_power_limit_mw, uint32_t)
NUMBER(nvmlDeviceGetTotalEnergyConsumption, V_energy_mj, uint64_t)
NUMBER(nvmlDeviceGetCurrentClocksEventReasons, V_throttle, uint64_t)
NUMBER(nvmlDeviceGetCurrentClocksThrottleReasons, V_throttle, uint64_t)
NUMBER(nvmlDeviceGetPerformanceState, V_pstate, uint32_t)
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, V_pcie_gen, uint32_t)
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, V_pcie_gen_max, uint32_t)
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, V_pcie_width, uint32_t)
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, V_pcie_width_max, uint32_t)
NUMBER(nvmlDeviceGetPcieReplayCounter, V_pcie_replay, uint32_t)
NUMBER(nvmlDeviceGetSupportedEventTypes, V_event_types, uint64_t)
CHOSEN(nvmlDeviceGetTemperature, uint32_t, which ? V_temp_mem : V_temp_gpu)
CHOSEN(nvmlDeviceGetTemperatureThreshold, uint32_t, which == 0 ? V_temp_shutdown : V_temp_slowdown)
CHOSEN(nvmlDeviceGetClockInfo, uint32_t, which == 2 ? V_clock_mem : V_clock_sm)
CHOSEN(nvmlDeviceGetMaxClockInfo, uint32_t, which == 2 ? V_clock_max_mem : V_clock_max_sm)
CHOSEN(nvmlDeviceGetPcieThroughput, uint32_t, which == 0 ? V_pcie_tx_kib : V_pcie_rx_kib)

EXPORT Ret nvmlDeviceGetUtilizationRates(Handle h, uint32_t *to) {
    ENTER(h);
    WHOLE_ONLY(h);
    int64_t gpu = 0, memory = 0;
    Ret ret = number(h, V_util_gpu, &gpu);
    if (!ret) ret = number(h, V_util_mem, &memory);
    if (!ret) to[0] = (uint32_t)gpu, to[1] = (uint32_t)memory;
    LEAVE(ret);
}
#define CODEC(function, which) \
    EXPORT Ret function(Handle h, uint32_t *to, uint32_t *period_us) { \
        ENTER(h); \
        WHOLE_ONLY(h); \
        int64_t found = 0; \
        Ret ret = number(h, which, &found); \
        if (!ret) *to = (uint32_t)found, *period_us = 167000; \
        LEAVE(ret); \
    }
CODEC(nvmlDeviceGetEncoderUtilization, V_util_enc)
CODEC(nvmlDeviceGetDecoderUtilization, V_util_dec)
EXPORT Ret nvmlDeviceGetEccMode(Handle h, uint32_t *current, uint32_t *pending) {
    ENTER(h);
    int64_t now = 0, then = 0;
    Ret ret = number(h, V_ecc_mode, &now);
    if (!ret) ret = number(h, V_ecc_pending, &then);
    if (!ret) *current = (uint32_t)now, *pending = (uint32_t)then;
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetTotalEccErrors(Handle h, uint32_t kind, uint32_t span, uint64_t *to) {
    ENTER(h);
    int64_t found = 0;
    Ret ret = kind > 1 || span > 1 ? INVALID
              : number(h, span ? (kind ? V_ecc_uncorrected_total : V_ecc_corrected_total)
                               : (kind ? V_ecc_uncorrected : V_ecc_corrected), &found);
    if (!ret) *to = (uint64_t)found;
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetRemappedRows(Handle h, uint32_t *corrected, uint32_t *uncorrected, uint32_t *pending,
                                     uint32_t *failed) {
    ENTER(h);
    int64_t v[4];
    Ret ret = OK;
    for (int i = 0; i < 4 && !ret; i++) ret = number(h, V_remap_corrected + i, &v[i]);
    if (!ret) *corrected = (uint32_t)v[0], *uncorrected = (uint32_t)v[1], *pending = v[2] != 0, *failed = v[3] != 0;
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetRowRemapperHistogram(Handle h, uint32_t *to) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (!ret && d->value[V_remap_corrected] < 0) ret = NOT_SUPPORTED;
    for (uint32_t i = 0; i < 5 && !ret; i++) to[i] = i ? 0 : 640;
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetRetiredPages(Handle h, uint32_t cause, uint32_t *count, uint64_t *to) {
    ENTER(h);
    int64_t pages = 0;
    Ret ret = number(h, cause ? V_retired_dbe : V_retired_sbe, &pages);
    if (ret) LEAVE(ret);
    uint32_t room = *count;
    *count = (uint32_t)pages;
    if (!to) LEAVE(pages ? SIZE : OK);
    if (room < pages) LEAVE(SIZE);
    for (uint32_t i = 0; i < pages; i++) to[i] = 0x1000u * (i + 1);
    LEAVE(OK);
}
EXPORT Ret nvmlDeviceGetViolationStatus(Handle h, uint32_t kind, uint64_t *to) {
    ENTER(h);
    int64_t found = 0;
    Ret ret = kind > 1 ? NOT_SUPPORTED : number(h, kind ? V_violation_thermal_ns : V_violation_power_ns, &found);
    if (!ret) to[0] = (uint64_t)now_ms() * 1000, to[1] = (uint64_t)found;
    LEAVE(ret);
}

typedef struct { uint32_t field, scope; int64_t at, latency; int32_t type, ret; union { uint64_t u64; uint32_t u32; } value; } Field;
static Ret field(const Device *d, Field *f) {
    int64_t found = -NOT_SUPPORTED;
    f->type = 3; /* unsigned long long */
    switch (f->field) {
    case 82: found = d->value[V_temp_mem]; f->type = 1; break;
    case 94: found = d->value[V_pcie_replay]; f->type = 1; break;
    case 138: case 140: found = d->value[V_nvlinks] > 0 ? d->value[V_nvlink_tx_kib] : -NOT_SUPPORTED; break;
    case 139: case 141: found = d->value[V_nvlinks] > 0 ? d->value[V_nvlink_rx_kib] : -NOT_SUPPORTED; break;
    case 230: found = d->value[V_recovery]; f->type = 1; break;
    default: break;
    }
    if (found < 0) return (Ret)-found;
    if (f->type == 1) f->value.u32 = (uint32_t)found; else f->value.u64 = (uint64_t)found;
    return OK;
}
EXPORT Ret nvmlDeviceGetFieldValues(Handle h, int32_t count, Field *to) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    for (int i = 0; !ret && i < count; i++) {
        to[i].at = now_ms() * 1000;
        to[i].ret = field(d, &to[i]);
    }
    LEAVE(ret);
}

/* Topology: GPUs of one NUMA node share a host bridge; links lead to a switch, or bridge pairs (0 with 1, ...). */
EXPORT Ret nvmlDeviceGetTopologyCommonAncestor(Handle h, Handle other, uint32_t *to) {
    ENTER(h);
    Device *a, *b;
    Ret ret = gpu_of(h, &a);
    if (!ret) ret = gpu_of(other, &b);
    if (!ret) *to = a == b ? 0 : a->value[V_numa] != b->value[V_numa] ? 50 : 30;
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetCpuAffinity(Handle h, uint32_t size, unsigned long *to) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    for (uint32_t i = 0; i < size && !ret; i++) to[i] = i == (uint32_t)(d->value[V_numa] > 0) ? ~0ul : 0;
    LEAVE(ret);
}
static Ret link_of(Handle h, uint32_t link, Device **d) {
    Ret ret = gpu_of(h, d);
    return ret ? ret : (*d)->value[V_nvlinks] <= 0 ? NOT_SUPPORTED : link >= (*d)->value[V_nvlinks] ? INVALID : OK;
}
EXPORT Ret nvmlDeviceGetNvLinkState(Handle h, uint32_t link, uint32_t *to) {
    ENTER(h);
    Device *d;
    Ret ret = link_of(h, link, &d);
    if (!ret) *to = !(d->value[V_nvlink_down] >> link & 1);
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetNvLinkVersion(Handle h, uint32_t link, uint32_t *to) {
    ENTER(h);
    Device *d;
    Ret ret = link_of(h, link, &d);
    if (!ret) *to = d->arch >= 10 ? 5 : d->arch >= 9 ? 4 : 3;
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetNvLinkRemoteDeviceType(Handle h, uint32_t link, uint32_t *to) {
    ENTER(h);
    Device *d;
    Ret ret = link_of(h, link, &d);
    if (!ret) *to = d->value[V_nvlink_switch] ? 2 : 0;
    LEAVE(ret);
}
EXPORT Ret nvmlDeviceGetNvLinkRemotePciInfo_v2(Handle h, uint32_t link, Pci *to) {
    ENTER(h);
    Device *d;
    Ret ret = link_of(h, link, &d);
    if (ret) LEAVE(ret);
    memset(to, 0, sizeof *to);
    uint32_t peer = index_of(d) ^ 1;
    if (d->value[V_nvlink_switch]) snprintf(to->bus_id, sizeof to->bus_id, "00000000:%02X:00.0", 0xF0 + link % 4);
    else if (peer < box->devices) snprintf(to->bus_id, sizeof to->bus_id, "%s", box->device[peer].bus);
    LEAVE(OK);
}
EXPORT Ret nvmlDeviceGetP2PStatus(Handle h, Handle other, uint32_t which, uint32_t *to) {
    ENTER(h);
    Device *a, *b;
    Ret ret = gpu_of(h, &a);
    if (!ret) ret = gpu_of(other, &b);
    if (ret) LEAVE(ret);
    int linked = a != b && a->value[V_nvlinks] > 0 && b->value[V_nvlinks] > 0 && a->value[V_mig_current] != 1 &&
                 b->value[V_mig_current] != 1 && (a->value[V_nvlink_switch] || (index_of(a) ^ 1) == index_of(b));
    *to = which == 2 ? (linked ? 0 : 5) : 0;
    LEAVE(OK);
}
typedef struct { uint32_t version; uint8_t cluster[16]; int32_t status; uint32_t clique, state, health; } Fabric;
EXPORT Ret nvmlDeviceGetGpuFabricInfoV(Handle h, Fabric *to) {
    ENTER(h);
    Device *d;
    Ret ret = gpu_of(h, &d);
    if (ret) LEAVE(ret);
    if (to->version != (sizeof(Fabric) | 2u << 24)) LEAVE(VERSION);
    memset(to->cluster, 0, sizeof to->cluster);
    to->status = OK, to->clique = 0, to->health = 0;
    to->state = d->value[V_nvlink_switch] && d->arch >= 9 ? 3 : 0;
    LEAVE(OK);
}
