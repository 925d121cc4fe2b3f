/* A stand-in for NVIDIA's libnvidia-ml.so.1: eight GPUs of known values, nvml.h's names.
 *
 * NVML_STUB holds words that change it:
 *   mig          GPU 0 is split into two MIG instances, and does not tell its utilisation
 *   mighidden    GPU 0 is split, and this process may use no instance of it
 *   unsupported  GPU 1 supports neither utilisation nor power
 *   lost         GPU 2 has fallen off the bus
 *   falls        GPU 2 does so once the file NVML_STUB_FILE exists
 *   hang         utilisation of GPU 3 never returns once that file exists
 *   hanginit     nvmlInit never returns
 *   constrained  a device cgroup: GPUs 2 and 3 alone may be opened, and are counted from 0
 *   forbidden    another kind of it: all are counted, only 2 and 3 may be opened
 *   old          no function that came after the first driver of this interface
 *   nodriver     the driver is not loaded
 *   minors       the device files are numbered backwards
 *
 * GPU n is 10 * n percent busy, 60 + n degrees, draws 100 + n W of 400 and has 1 + n of 80 GiB
 * in use and 512 MiB kept by the driver; GPU 5 is slowed by its power cap and by heat.
 * NVML_STUB_PID computes on GPU 1 and, with mig, on the second instance of GPU 0.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define COUNT 8
#define GIB (1024ULL * 1024 * 1024)
enum { SUCCESS, INVALID = 2, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 6, NO_DRIVER = 9, NO_FUNCTION = 13, LOST = 15 };

typedef struct { int index, instance; } Device;         /* instance 0 is the whole GPU */
static Device devices[COUNT], instances[2] = {{0, 1}, {0, 2}};

static int has(const char *word) {
    const char *words = getenv("NVML_STUB");
    size_t length = strlen(word);
    for (; words && *words; words += strcspn(words, " "), words += *words == ' ')
        if (!strncmp(words, word, length) && strchr(" ", words[length])) return 1;
    return 0;
}

static int told(void) {
    const char *file = getenv("NVML_STUB_FILE");
    return file && !access(file, F_OK);
}

static void hang(void) { for (;;) pause(); }

static int lost(const Device *d) { return d->index == 2 && (has("lost") || (has("falls") && told())); }

#define CHECK(d) do { if (lost(d)) return LOST; } while (0)

int nvmlInit_v2(void) {
    if (has("hanginit")) hang();
    return has("nodriver") ? NO_DRIVER : SUCCESS;
}

const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : "stub"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = has("constrained") ? 2 : COUNT;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    if (has("constrained")) index += 2;
    if (index >= COUNT) return INVALID;
    if (has("forbidden") && index != 2 && index != 3) return NO_PERMISSION;
    devices[index].index = (int)index;
    CHECK(&devices[index]);
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *d, char *text, unsigned size) {
    CHECK(d);
    if (d->instance) snprintf(text, size, "MIG-0000000%d-aaaa", d->instance);
    else snprintf(text, size, "GPU-0000000%d-bbbb", d->index);
    return SUCCESS;
}

int nvmlDeviceGetName(Device *d, char *text, unsigned size) {
    CHECK(d);
    snprintf(text, size, d->instance ? "NVIDIA Stub MIG %dg.%dgb" : "NVIDIA Stub", d->instance, 10 * d->instance);
    return SUCCESS;
}

int nvmlDeviceGetMinorNumber(Device *d, unsigned *minor) {
    CHECK(d);
    if (has("old")) return NOT_SUPPORTED;
    *minor = (unsigned)(has("minors") ? COUNT - 1 - d->index : d->index);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Device *d, unsigned *current, unsigned *pending) {
    CHECK(d);
    if (has("old")) return NO_FUNCTION;
    if (d->index > 3) return NOT_SUPPORTED;
    *current = *pending = (has("mig") || has("mighidden")) && d->index == 0;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *d, unsigned *count) {
    CHECK(d);
    *count = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *d, unsigned index, Device **device) {
    CHECK(d);
    if (has("mighidden") || (index != 1 && index != 3)) return NOT_FOUND;     /* the slots may have holes */
    *device = &instances[index / 2];
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(Device *d, unsigned *rates) {
    CHECK(d);
    if (d->instance || (d->index == 1 && has("unsupported"))) return NOT_SUPPORTED;
    if (d->index == 3 && has("hang") && told()) hang();
    rates[0] = 10 * (unsigned)d->index;
    rates[1] = 1;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device *d, unsigned long long *words) {     /* total, free, used */
    CHECK(d);
    words[0] = d->instance ? 10 * d->instance * GIB : 80 * GIB;
    words[2] = d->instance ? d->instance * GIB : (1 + d->index) * GIB + GIB / 2;
    words[1] = words[0] - words[2];
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Device *d, unsigned long long *words) {
    CHECK(d);
    if (has("old")) return NO_FUNCTION;
    if ((unsigned)words[0] != (40U | 2U << 24)) return 25;      /* version, total, reserved, free, used */
    words[1] = d->instance ? 10 * d->instance * GIB : 80 * GIB;
    words[2] = d->instance ? 0 : GIB / 2;
    words[4] = d->instance ? d->instance * GIB : (1 + d->index) * GIB;
    words[3] = words[1] - words[2] - words[4];
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(Device *d, unsigned *milliwatts) {
    CHECK(d);
    if (d->instance || (d->index == 1 && has("unsupported"))) return NOT_SUPPORTED;
    *milliwatts = 1000 * (100 + (unsigned)d->index);
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(Device *d, unsigned *milliwatts) {
    CHECK(d);
    if (d->instance) return NOT_SUPPORTED;
    *milliwatts = 400000;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(Device *d, int sensor, unsigned *degrees) {
    CHECK(d);
    if (sensor || d->instance) return NOT_SUPPORTED;
    *degrees = 60 + (unsigned)d->index;
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *d, unsigned long long *reasons) {
    CHECK(d);
    if (d->instance) return NOT_SUPPORTED;
    *reasons = d->index == 5 ? 0x04 | 0x40 : 0x01;      /* 1: it idles, which is no throttling */
    return SUCCESS;
}

static int processes(Device *d, unsigned *count, char *rows, size_t size) {
    const char *pid = getenv("NVML_STUB_PID");
    CHECK(d);
    if (!pid || (d->index != 1 && d->instance != 2)) { *count = 0; return SUCCESS; }
    if (*count < 1) return 7;
    memset(rows, 0, size);
    *(unsigned *)rows = (unsigned)atoi(pid);
    *count = 1;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses(Device *d, unsigned *count, char *rows) { return processes(d, count, rows, 16); }

int nvmlDeviceGetComputeRunningProcesses_v3(Device *d, unsigned *count, char *rows) {
    return has("old") ? NO_FUNCTION : processes(d, count, rows, 24);
}
