// libcuda, libnvcuvid and libnvidia-encode in one, for PyNvVideoCodec on a CPU: device memory is the host's, and FFmpeg
// decodes, through `hooks` that host_nvdec.py fills in. Structures and numbers are those of NVIDIA's dynlink headers,
// as far as they are used. PyNvVideoCodec's exceptions pass through the callbacks here, so they are C, not ctypes.
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST 64  // decode surfaces
enum { CUDA_SUCCESS, INVALID = 1, NOT_SUPPORTED = 801, UNKNOWN = 999 };

typedef struct {
    int codec;
    unsigned rate, per;
    unsigned char progressive, luma_bits_minus_8, chroma_bits_minus_8, least_surfaces;
    unsigned coded_width, coded_height;
    int left, top, right, bottom, chroma;
    unsigned bitrate;
    int aspect[2];
    unsigned char signal[4];
    unsigned more;
} Format;
typedef struct {
    int index, progressive, top_first, repeat;
    long long pts;
} Display;
typedef struct {
    int blocks_wide, blocks_high, index, rest[4096];
} Picture;
typedef struct {
    int codec;
    unsigned surfaces, clock, threshold, delay, flags, reserved[4];
    void* user;
    int (*sequence)(void*, Format*);
    int (*decode)(void*, Picture*);
    int (*display)(void*, Display*);
    void* more[8];
} ParserParameters;
typedef struct {
    unsigned long flags, size;
    const unsigned char* data;
    long long pts;
} Packet;
typedef struct {
    unsigned long width, height, surfaces;
    int codec, chroma;
    unsigned long flags, bits, intra, most_width, most_height, reserved;
    short area[4];
    int surface, deinterlace;
    unsigned long target_width, target_height, outputs;
} DecoderParameters;
typedef struct {
    int codec, chroma;
    unsigned bits_minus_8, reserved[3];
    unsigned char supported, engines;
    unsigned short surfaces;
    unsigned most_width, most_height, most_blocks;
    unsigned short least_width, least_height;
} Capabilities;

typedef struct {
    ParserParameters given;
    int surfaces, indices[MOST], waiting, sequence;
    long long pts[MOST];
    Display showing;
    int corrupt;
} Parser;
typedef struct {
    Parser* parser;
    DecoderParameters given;
    unsigned char* mapped;
    unsigned pitch;
} Decoder;

struct {
    void (*capabilities)(Capabilities*);
    // Decodes a packet, or drains where there is none. Fills in the format; returns 1 where a sequence begins.
    int (*feed)(Parser*, int codec, const unsigned char*, unsigned long size, long long pts, Format*);
    // The next picture in display order: 1, 0 where there is none.
    int (*shown)(Parser*, int drained, long long* pts, int* corrupt);
    // Of that picture; each plane begins `lines` lines after the one before.
    void (*pixels)(unsigned char* surface, unsigned pitch, unsigned long lines);
    void (*closed)(Parser*);
    // A copy of some bytes to device memory that was queued on a stream.
    void (*copied)(void* to, size_t bytes, void* stream);
    void (*freed)(void* memory, size_t bytes);
} hooks;
_Thread_local int failing;  // every call of this thread that decodes or shows

// --- libnvcuvid

static _Thread_local Parser* creating;

int cuvidGetDecoderCaps(Capabilities* out) { return hooks.capabilities(out), CUDA_SUCCESS; }

int cuvidCreateVideoParser(Parser** out, const ParserParameters* given) {
    *out = calloc(1, sizeof **out);
    (*out)->given = *given, (*out)->surfaces = (int)given->surfaces;
    return CUDA_SUCCESS;
}

int cuvidDestroyVideoParser(Parser* p) {
    hooks.closed(p), free(p);
    return CUDA_SUCCESS;
}

static void show(Parser* p, int drained) {
    long long pts;
    while (hooks.shown(p, drained, &pts, &p->corrupt)) {
        int at = 0;
        while (at < p->waiting && p->pts[at] != pts) ++at;
        if (at == p->waiting) continue;
        p->showing = (Display){.index = p->indices[at], .progressive = 1, .pts = pts};
        --p->waiting;
        memmove(p->indices + at, p->indices + at + 1, (p->waiting - at) * sizeof *p->indices);
        memmove(p->pts + at, p->pts + at + 1, (p->waiting - at) * sizeof *p->pts);
        p->given.display(p->given.user, &p->showing);
    }
    if (drained) p->waiting = 0;
}

int cuvidParseVideoData(Parser* p, const Packet* packet) {
    if (packet->size) {
        Format format = {.codec = p->given.codec, .rate = 25, .per = 1, .progressive = 1, .least_surfaces = 20};
        if (hooks.feed(p, format.codec, packet->data, packet->size, packet->pts, &format) || !p->sequence) {
            creating = p;
            const int surfaces = p->given.sequence(p->given.user, &format);
            creating = NULL;
            if (!surfaces) return UNKNOWN;
            if (surfaces > 1) p->surfaces = surfaces;  // 1: as many as before, which at first is none to speak of
            p->sequence = 1;
        }
        int taken[MOST] = {0}, index = 0;
        for (int n = 0; n < p->waiting; ++n) taken[p->indices[n]] = 1;
        while (taken[index]) ++index;
        if (index >= p->surfaces || index >= MOST - 1) return INVALID;
        Picture picture = {.index = index};
        if (!p->given.decode(p->given.user, &picture)) return UNKNOWN;
        p->indices[p->waiting] = index, p->pts[p->waiting++] = packet->pts;
        show(p, 0);
    }
    if (packet->flags & 1) {  // the end of the stream: the next packet begins a sequence again
        if (p->sequence) hooks.feed(p, p->given.codec, NULL, 0, 0, NULL), show(p, 1);
        p->sequence = 0;
    }
    return CUDA_SUCCESS;
}

int cuvidCreateDecoder(Decoder** out, const DecoderParameters* given) {
    Decoder* d = *out = calloc(1, sizeof *d);
    d->parser = creating, d->given = *given;
    d->pitch = ((unsigned)given->target_width * (given->surface & 1 ? 2 : 1) + 511) / 512 * 512;
    d->mapped = malloc((size_t)d->pitch * given->target_height * 3);
    return CUDA_SUCCESS;
}

int cuvidDestroyDecoder(Decoder* d) {
    free(d->mapped), free(d);
    return CUDA_SUCCESS;
}

void stub_fail(int on) { failing = on; }
int cuvidDecodePicture(Decoder* d, Picture* picture) {
    return (void)d, (void)picture, failing ? UNKNOWN : CUDA_SUCCESS;
}

int cuvidGetDecodeStatus(Decoder* d, int index, int* status) {
    *status = index == d->parser->showing.index && d->parser->corrupt ? 9 : 2;  // concealed, success
    return CUDA_SUCCESS;
}

int cuvidMapVideoFrame64(Decoder* d, int index, uint64_t* at, unsigned* pitch, void* how) {
    (void)how;
    if (failing) return UNKNOWN;
    if (index != d->parser->showing.index) return INVALID;
    hooks.pixels(d->mapped, d->pitch, d->given.target_height);
    *at = (uint64_t)d->mapped, *pitch = d->pitch;
    return CUDA_SUCCESS;
}

int cuvidUnmapVideoFrame64(Decoder* d, uint64_t at) {
    memset(d->mapped, 0xAB, (size_t)d->pitch * d->given.target_height);
    return at == (uint64_t)d->mapped ? CUDA_SUCCESS : INVALID;
}

int cuvidReconfigureDecoder(Decoder* d, void* how) { return (void)d, (void)how, CUDA_SUCCESS; }

#define UNUSED(name) \
    int name(void) { return NOT_SUPPORTED; }
UNUSED(cuvidCtxLockCreate) UNUSED(cuvidCtxLockDestroy) UNUSED(cuvidCtxLock) UNUSED(cuvidCtxUnlock)
UNUSED(cuvidCreateVideoSource) UNUSED(cuvidCreateVideoSourceW) UNUSED(cuvidDestroyVideoSource)
UNUSED(cuvidSetVideoSourceState) UNUSED(cuvidGetVideoSourceState) UNUSED(cuvidGetSourceVideoFormat)
UNUSED(cuvidGetSourceAudioFormat)

// --- libnvidia-encode: its version is that of the driver

int NvEncodeAPIGetMaxSupportedVersion(uint32_t* version) { return *version = 13 << 4, 0; }
UNUSED(NvEncodeAPICreateInstance)

// --- libcuda

typedef uint64_t Pointer;
static _Thread_local int depth;
static char context;

int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxRetain(void** out, int device) { return *out = &context, device; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device; }
int cuCtxCreate_v2(void** out, unsigned flags, int device) { return (void)flags, *out = &context, ++depth, device; }
int cuCtxDestroy_v2(void* which) { return (void)which, depth -= depth > 0, 0; }
int cuCtxGetDevice(int* device) { return *device = 0; }
int cuCtxPushCurrent_v2(void* which) { return ++depth, which != &context; }
int cuCtxPopCurrent_v2(void** out) {
    if (!depth) return 201;  // an invalid context
    if (out) *out = &context;
    return --depth, CUDA_SUCCESS;
}
int cuGetErrorName(int error, const char** name) { return (void)error, *name = "CUDA_ERROR", 0; }
int cuGetErrorString(int error, const char** text) { return (void)error, *text = "an error of the stub", 0; }

int cuMemAlloc_v2(Pointer* out, size_t bytes) {
    void* memory = malloc(bytes);
    if (memory) memset(memory, 0xAB, bytes);
    *out = (Pointer)memory;
    return memory ? CUDA_SUCCESS : 2;
}
int cuMemAllocAsync(Pointer* out, size_t bytes, void* stream) { return (void)stream, cuMemAlloc_v2(out, bytes); }
int cuMemAllocPitch_v2(Pointer* out, size_t* pitch, size_t width, size_t height, unsigned element) {
    (void)element, *pitch = (width + 511) / 512 * 512;
    return cuMemAlloc_v2(out, *pitch * height);
}
int cuMemFree_v2(Pointer at) {
    void* memory = (void*)at;
    if (memory) hooks.freed(memory, malloc_usable_size(memory)), free(memory);
    return CUDA_SUCCESS;
}
int cuMemFreeAsync(Pointer at, void* stream) { return (void)stream, cuMemFree_v2(at); }

typedef struct {
    size_t x, y;
    int kind;  // 1: the host's
    void* host;
    Pointer device;
    void* array;
    size_t pitch;
} Side;
typedef struct {
    Side from, to;
    size_t width, height;
} Copy2D;
int cuMemcpy2DAsync_v2(const Copy2D* copy, void* stream) {
    const char* from = copy->from.kind == 1 ? copy->from.host : (const char*)copy->from.device;
    char* to = copy->to.kind == 1 ? copy->to.host : (char*)copy->to.device;
    for (size_t y = 0; y < copy->height; ++y)
        memcpy(to + y * copy->to.pitch, from + y * copy->from.pitch, copy->width);
    if (copy->to.kind != 1) hooks.copied(to, copy->to.pitch * copy->height, stream);
    return CUDA_SUCCESS;
}
int cuMemcpy2D_v2(const Copy2D* copy) { return cuMemcpy2DAsync_v2(copy, NULL); }
int cuMemcpyDtoH_v2(void* to, Pointer from, size_t bytes) { return memcpy(to, (void*)from, bytes), 0; }
int cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* s) { return (void)s, cuMemcpyDtoH_v2(to, from, bytes); }
int cuMemcpyHtoD_v2(Pointer to, const void* from, size_t bytes) { return memcpy((void*)to, from, bytes), 0; }
int cuPointerGetAttribute(void* out, int attribute, Pointer at) { return (void)attribute, (void)at, *(int*)out = 0; }

int cuStreamCreate(void** out, unsigned flags) { return (void)flags, *out = malloc(8), 0; }
int cuStreamDestroy_v2(void* stream) { return free(stream), 0; }
int cuStreamGetCtx(void* stream, void** out) { return (void)stream, *out = &context, 0; }
int cuStreamSynchronize(void* stream) { return (void)stream, 0; }
int cuStreamWaitEvent(void* stream, void* event, unsigned flags) { return (void)stream, (void)event, (int)flags; }
int cuEventCreate(void** out, unsigned flags) { return (void)flags, *out = malloc(8), 0; }
int cuEventDestroy_v2(void* event) { return free(event), 0; }
int cuEventRecord(void* event, void* stream) { return (void)event, (void)stream, 0; }
int cuEventSynchronize(void* event) { return (void)event, 0; }
