// A TCG plugin for qemu-aarch64 7.x and 8.x: counts executed instructions between two marks that the program sets.
//
// A mark is the system call sched_get_priority_max(0x7e570000 | n), which changes nothing: from it to the next one,
// instructions belong to region n; n = 0 ends counting. At the end one line goes to stderr for each region used:
//   instruction-count region=1 total=123 simd=45 multiply=6 crypto=0 library=78
// Counts the thread that marks; others (ONNX Runtime keeps one) run when they like and would make every run differ.
// Not for qemu-aarch64-static, which loads no plugin.
// sched_get_priority_max(0x7e580000, start, end) names the addresses whose instructions count as `library` too; code
// that was translated before does not, so the mark comes as soon as the library is loaded.
// sched_get_priority_max(0x7e590000 | n) begins region n too, and lists what it executes in the library: blocks of code
// that end in a branch, and how often each came after which other one (0: after code outside of the library). A region
// is listed once. At the end one line goes to stderr for each block and for each step from block to block:
//   executed-block id=1 address=4096 words=00ff...
//   executed-step region=1 before=0 block=1 times=7
// `simd` is the A64 encoding group "Data Processing -- Scalar Floating-Point and Advanced SIMD" and the loads and
// stores of its registers; `multiply` are integer multiply-adds, long ones and dot products; `crypto` AES, SHA and
// 64-bit polynomial products, which QEMU's Cortex-A53 has and a Raspberry Pi's has not.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Version 1 of QEMU's plugin interface, as far as it is used here (docs/devel/tcg-plugins of QEMU).
typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
typedef void (*qemu_plugin_vcpu_tb_trans_cb_t)(qemu_plugin_id_t id, struct qemu_plugin_tb *tb);
typedef void (*qemu_plugin_vcpu_syscall_cb_t)(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, uint64_t a1,
                                              uint64_t a2, uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6,
                                              uint64_t a7, uint64_t a8);
typedef void (*qemu_plugin_udata_cb_t)(qemu_plugin_id_t id, void *userdata);
typedef void (*qemu_plugin_vcpu_udata_cb_t)(unsigned int vcpu, void *userdata);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, qemu_plugin_vcpu_tb_trans_cb_t callback);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t id, qemu_plugin_vcpu_syscall_cb_t callback);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, qemu_plugin_udata_cb_t callback, void *userdata);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, qemu_plugin_vcpu_udata_cb_t callback,
                                          enum qemu_plugin_cb_flags flags, void *userdata);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

enum { TOTAL, SIMD, MULTIPLY, CRYPTO, LIBRARY, CLASSES };
enum { REGIONS = 65536, SCHED_GET_PRIORITY_MAX = 125 };
enum { MARK_REGION = 0x7e570000, MARK_LIBRARY = 0x7e580000, MARK_LISTED_REGION = 0x7e590000 };
static const char *const class_names[CLASSES] = {"total", "simd", "multiply", "crypto", "library"};

// A thread is a vcpu to QEMU, and the first one has number 0.
static unsigned counted_vcpu;
static uint64_t executed[CLASSES];
static uint64_t at_mark[CLASSES];
static uint64_t of_region[REGIONS][CLASSES];
static unsigned region;
static uint64_t library_start, library_end;

// A block of code as it was translated. Those of the library have an id, from 1.
struct step {
    struct block *before;
    uint64_t times;
    struct step *next;
};
struct block {
    uint64_t amounts[CLASSES];
    uint64_t address;
    unsigned id;
    uint32_t *words;
    struct step *steps;
    struct block *next;
};
static struct block *library_blocks, *previous;
static unsigned blocks_of_library;
static bool listing;

// What finished regions listed.
struct listed_step {
    unsigned region, before, block;
    uint64_t times;
};
static struct listed_step *listed;
static size_t listed_count, listed_room;

static bool is_simd(uint32_t word) {
    bool data_processing = (word >> 25 & 7) == 7;
    bool load_store = (word >> 25 & 5) == 4 && (word >> 26 & 1) != 0;
    return data_processing || load_store;
}

static bool is_crypto(uint32_t word) {
    bool aes = (word & 0xff3e0c00) == 0x4e280800;
    bool sha = (word & 0xff208c00) == 0x5e000000 || (word & 0xff3e0c00) == 0x5e280800;
    bool polynomial = (word & 0xbfe0fc00) == 0x0ee0e000;
    return aes || sha || polynomial;
}

// Mask and value of the encodings, any size and register.
static bool is_multiply(uint32_t word) {
    static const uint32_t encodings[][2] = {
        {0x9f20dc00, 0x0e208000},  // smlal, smlsl and unsigned
        {0x9f20fc00, 0x0e20c000},  // smull, umull
        {0x9f20fc00, 0x0e209400},  // mla, mls
        {0xbf20fc00, 0x0e209c00},  // mul
        {0x9f20fc00, 0x0e009400},  // sdot, udot
        {0x9f00b400, 0x0f002000},  // smlal, smlsl by element
        {0xbf00f400, 0x0f008000},  // mul by element
        {0xbf00b400, 0x2f000000},  // mla, mls by element
    };
    for (size_t i = 0; i < sizeof encodings / sizeof encodings[0]; ++i) {
        if ((word & encodings[i][0]) == encodings[i][1]) return true;
    }
    return false;
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (memory == NULL) abort();
    return memory;
}

static void step_to(struct block *block) {
    struct step *step = block->steps;
    while (step != NULL && step->before != previous) step = step->next;
    if (step == NULL) {
        step = allocate(1, sizeof *step);
        step->before = previous;
        step->next = block->steps;
        block->steps = step;
    }
    ++step->times;
}

static void executing(unsigned int vcpu, void *data) {
    if (vcpu != counted_vcpu) return;
    struct block *block = data;
    for (int i = 0; i < CLASSES; ++i) executed[i] += block->amounts[i];
    if (!listing) return;
    if (block->id != 0) step_to(block);
    previous = block->id != 0 ? block : NULL;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    // Kept as long as the program runs: QEMU may execute the block at any time.
    struct block *block = allocate(1, sizeof *block);
    size_t count = qemu_plugin_tb_n_insns(tb);
    block->address = qemu_plugin_tb_vaddr(tb);
    bool in_library = library_start <= block->address && block->address < library_end;
    if (in_library) block->words = allocate(count, sizeof *block->words);
    for (size_t i = 0; i < count; ++i) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), sizeof word);
        block->amounts[TOTAL] += 1;
        block->amounts[SIMD] += is_simd(word);
        block->amounts[MULTIPLY] += is_multiply(word);
        block->amounts[CRYPTO] += is_crypto(word);
        if (in_library) block->words[i] = word;
    }
    if (in_library) {
        block->amounts[LIBRARY] = block->amounts[TOTAL];
        block->id = ++blocks_of_library;
        block->next = library_blocks;
        library_blocks = block;
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, executing, QEMU_PLUGIN_CB_NO_REGS, block);
}

// Moves the steps of the region that ends to the list.
static void list_steps(void) {
    for (struct block *block = library_blocks; block != NULL; block = block->next) {
        for (struct step *step = block->steps; step != NULL; step = step->next) {
            if (step->times == 0) continue;
            if (listed_count == listed_room) {
                listed_room = listed_room * 2 + 1024;
                listed = realloc(listed, listed_room * sizeof *listed);
                if (listed == NULL) abort();
            }
            unsigned before = step->before != NULL ? step->before->id : 0;
            listed[listed_count++] = (struct listed_step){region, before, block->id, step->times};
            step->times = 0;
        }
    }
}

static void system_call(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3,
                        uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
    (void)id, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != SCHED_GET_PRIORITY_MAX) return;
    if ((uint32_t)a1 == MARK_LIBRARY) {
        library_start = a2;
        library_end = a3;
    }
    uint32_t mark = a1 & 0xffff0000;
    if (mark != MARK_REGION && mark != MARK_LISTED_REGION) return;
    for (int i = 0; i < CLASSES; ++i) {
        of_region[region][i] += executed[i] - at_mark[i];
        at_mark[i] = executed[i];
    }
    if (listing) list_steps();
    listing = mark == MARK_LISTED_REGION;
    previous = NULL;
    region = a1 & 0xffff;
    counted_vcpu = vcpu;
}

static void print_blocks(void) {
    bool *used = allocate(blocks_of_library + 1, sizeof *used);
    for (size_t i = 0; i < listed_count; ++i) used[listed[i].before] = used[listed[i].block] = true;
    for (struct block *block = library_blocks; block != NULL; block = block->next) {
        if (!used[block->id]) continue;
        fprintf(stderr, "executed-block id=%u address=%llu words=", block->id, (unsigned long long)block->address);
        // Bytes as they lie in memory.
        for (uint64_t i = 0; i < block->amounts[TOTAL]; ++i) fprintf(stderr, "%08x", __builtin_bswap32(block->words[i]));
        fprintf(stderr, "\n");
    }
    for (size_t i = 0; i < listed_count; ++i) {
        fprintf(stderr, "executed-step region=%u before=%u block=%u times=%llu\n", listed[i].region, listed[i].before,
                listed[i].block, (unsigned long long)listed[i].times);
    }
    free(used);
}

static void finished(qemu_plugin_id_t id, void *userdata) {
    (void)id, (void)userdata;
    for (unsigned n = 1; n < REGIONS; ++n) {
        if (of_region[n][TOTAL] == 0) continue;
        fprintf(stderr, "instruction-count region=%u", n);
        for (int i = 0; i < CLASSES; ++i) {
            fprintf(stderr, " %s=%llu", class_names[i], (unsigned long long)of_region[n][i]);
        }
        fprintf(stderr, "\n");
    }
    print_blocks();
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, system_call);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
