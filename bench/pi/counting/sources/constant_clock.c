// For qemu-aarch64 of this machine, by LD_PRELOAD: what the emulated program asks the system for and what would differ from
// run to run. The time of day starts at a fixed second and moves on by a microsecond a question, and random bytes are the
// same ones each time: a hash table with a random key lets go of its entries in another order, and the heap comes to lie
// otherwise. The clock that QEMU and timeouts go by is left alone.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum { START = 1700000000, PER_SECOND = 1000000, NANOSECONDS = 1000 };

static long fill(uint8_t *bytes, size_t count) {
    static uint64_t state = 0x9e3779b97f4a7c15;
    for (size_t i = 0; i < count; ++i) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        bytes[i] = (uint8_t)(state >> 32);
    }
    return (long)count;
}

EXPORT int clock_gettime(clockid_t clock, struct timespec *now) {
    static long asked;
    if (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE) return (int)syscall(SYS_clock_gettime, clock, now);
    long count = __atomic_add_fetch(&asked, 1, __ATOMIC_RELAXED);
    now->tv_sec = START + count / PER_SECOND;
    now->tv_nsec = count % PER_SECOND * NANOSECONDS;
    return 0;
}

// QEMU asks for random bytes with syscall(), which takes up to six arguments.
EXPORT long syscall(long number, ...) {
    static long (*next)(long, ...);
    long a[6];
    va_list arguments;
    va_start(arguments, number);
    for (int i = 0; i < 6; ++i) a[i] = va_arg(arguments, long);
    va_end(arguments);
    if (number == SYS_getrandom) return fill((uint8_t *)a[0], (size_t)a[1]);
    if (next == NULL) next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
