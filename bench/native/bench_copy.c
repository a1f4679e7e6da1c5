// SPDX-License-Identifier: GPL-2.0
/*
 * How fast does this CPU copy a folio: 4 KiB at a time, as folio_mc_copy() does
 * in 7.3, against all of it with one instruction?
 *
 *	bench_copy [--pairs N] [--json FILE]
 *
 * Runs on the host, not in a guest, and as any user. The instructions are those
 * that x86-64 kernels copy with: "rep movsb" of copy_mc_to_kernel() on a CPU
 * with ERMS, "rep movsq" of copy_page(). Others do not know what is measured
 * here and SKIP (exit status 4).
 *
 * Source and destination are cold (the next ones of an arena of many times the
 * last-level cache) or warm (the same ones again). "read" is the time to read a
 * word of each line of the destination afterwards, as the task does whose
 * memory was moved: a copy that leaves it outside the caches would only have
 * passed the work on. Both shapes take turns, on the slots of one arena, and
 * who is first changes too. A ratio is that of the medians, loop : contiguous,
 * above 1 if contiguous is faster; "4k" is the control, as both are the same: by
 * how much that differs from 1 is noise.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE	4096UL
#define ARENA	(256UL << 20)

#ifdef __x86_64__
#include <cpuid.h>
#include <x86intrin.h>

/* Out of line, as in the kernel. */
__attribute__((noinline)) static void movsb(void *to, const void *from, size_t len)
{
	asm volatile("rep movsb" : "+D" (to), "+S" (from), "+c" (len) : : "memory");
}

__attribute__((noinline)) static void movsq(void *to, const void *from, size_t len)
{
	len /= 8;
	asm volatile("rep movsq" : "+D" (to), "+S" (from), "+c" (len) : : "memory");
}

static inline uint64_t now(void)
{
	unsigned int cpu;
	uint64_t t = __rdtscp(&cpu);

	_mm_lfence();
	return t;
}

static bool usable(void)
{
	unsigned int a, b, c, d;

	return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1 << 9));
}
#else
static void movsb(void *to, const void *from, size_t len) { memcpy(to, from, len); }
static void movsq(void *to, const void *from, size_t len) { memcpy(to, from, len); }
static inline uint64_t now(void) { return 0; }
static bool usable(void) { return false; }
#endif

typedef void copy_fn(void *to, const void *from, size_t len);

static volatile int resched_wanted;

__attribute__((noinline)) static void cond_resched(void)
{
	if (resched_wanted)
		sched_yield();
}

static void copy_loop(copy_fn *copy, char *to, const char *from, size_t len)
{
	for (size_t at = 0; at < len; at += PAGE) {
		copy(to + at, from + at, PAGE);
		cond_resched();
	}
}

static uint64_t read_all(const char *at, size_t len)
{
	volatile const uint64_t *word = (volatile const uint64_t *)at;
	uint64_t start = now();

	for (size_t i = 0; i < len / 8; i += 8)
		(void)word[i];
	return now() - start;
}

struct times {
	uint64_t *copy, *read;
};

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static double at_share(uint64_t *values, int n, double share)
{
	return values[(int)((n - 1) * share)];
}

static void *arena(size_t len)
{
	char *mem = mmap(NULL, len + (2UL << 20), PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (mem == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	mem = (char *)(((uintptr_t)mem + (2UL << 20) - 1) & ~((2UL << 20) - 1));
	/* As the kernel's own mapping: no TLB misses within 2 MiB. */
	madvise(mem, len, MADV_HUGEPAGE);
	for (size_t at = 0; at < len; at += 8)
		*(uint64_t *)(mem + at) = at;
	return mem;
}

static char *from, *to;

static void measure_one(copy_fn *copy, bool whole, size_t at, size_t len,
			struct times *t, int i)
{
	uint64_t start = now();

	if (whole)
		copy(to + at, from + at, len);
	else
		copy_loop(copy, to + at, from + at, len);
	t->copy[i] = now() - start;
	t->read[i] = read_all(to + at, len);
}

static void measure(copy_fn *copy, size_t len, bool cold, int pairs, struct times t[2])
{
	size_t at = 0;

	for (int i = -2; i < pairs; i++)
		for (int turn = 0; turn < 2; turn++) {
			bool whole = turn ^ (i & 1);

			measure_one(copy, whole, at, len, &t[whole], i < 0 ? 0 : i);
			/* Far enough that no prefetcher has been there. */
			if (cold)
				at = (at + len + 64 * PAGE) % (ARENA - len) & ~(PAGE - 1);
		}
}

/*
 * The ratio of the medians, of the lower and of the upper quartiles: if these are
 * far apart, somebody else was on this CPU.
 */
static void print_row(FILE *json, const char *insn, size_t len, bool cold, int pairs,
		      struct times t[2])
{
	double loop, whole, loop_read, whole_read;

	for (int shape = 0; shape < 2; shape++) {
		qsort(t[shape].copy, pairs, sizeof(uint64_t), by_value);
		qsort(t[shape].read, pairs, sizeof(uint64_t), by_value);
	}
	loop = at_share(t[0].copy, pairs, 0.5);
	whole = at_share(t[1].copy, pairs, 0.5);
	loop_read = loop + at_share(t[0].read, pairs, 0.5);
	whole_read = whole + at_share(t[1].read, pairs, 0.5);
	printf("%-5s  %5zuk  %-4s  %8.3f  %8.3f  %8.3f  %8.3f\n", insn, len >> 10,
	       cold ? "cold" : "warm", loop / whole,
	       at_share(t[0].copy, pairs, 0.25) / at_share(t[1].copy, pairs, 0.25),
	       at_share(t[0].copy, pairs, 0.75) / at_share(t[1].copy, pairs, 0.75),
	       loop_read / whole_read);
	if (json)
		fprintf(json, "%s{\"insn\": \"%s\", \"kb\": %zu, \"cold\": %s, \"pairs\": %d, \"ratio\": %.4f, \"with_read\": %.4f}",
			ftell(json) > 3 ? ",\n " : "", insn, len >> 10,
			cold ? "true" : "false", pairs, loop / whole, loop_read / whole_read);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "pairs", required_argument, NULL, 'p' },
		{ "json", required_argument, NULL, 'j' },
		{}
	};
	static const struct { const char *name; copy_fn *copy; } insns[] = {
		{ "movsb", movsb }, { "movsq", movsq },
	};
	FILE *json = NULL;
	int pairs = 400, c;
	struct times t[2];
	cpu_set_t one;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 'p' && atoi(optarg) >= 20) {
			pairs = atoi(optarg);
		} else if (c == 'j') {
			json = fopen(optarg, "w");
			if (!json) {
				perror(optarg);
				return 1;
			}
		} else {
			fprintf(stderr, "bench_copy [--pairs N (20 or more)] [--json FILE]\n");
			return 2;
		}
	}
	if (!usable()) {
		printf("SKIP: not an x86-64 CPU with ERMS\n");
		return 4;
	}
	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	sched_setaffinity(0, sizeof(one), &one);
	for (int shape = 0; shape < 2; shape++) {
		t[shape].copy = calloc(pairs, sizeof(uint64_t));
		t[shape].read = calloc(pairs, sizeof(uint64_t));
	}
	from = arena(ARENA);
	to = arena(ARENA);
	if (json)
		fprintf(json, "[\n ");
	printf("loop : contiguous, above 1 if contiguous is faster; %d pairs\n", pairs);
	printf("%-5s  %6s  %-4s  %8s  %8s  %8s  %8s\n", "rep", "folio", "", "median",
	       "lower q.", "upper q.", "and read");
	for (size_t i = 0; i < sizeof(insns) / sizeof(insns[0]); i++)
		for (size_t len = PAGE; len <= 512 * PAGE; len *= 2)
			for (int cold = 1; cold >= 0; cold--) {
				measure(insns[i].copy, len, cold, pairs, t);
				print_row(json, insns[i].name, len, cold, pairs, t);
			}
	if (json) {
		fprintf(json, "\n]\n");
		if (fclose(json)) {
			perror("--json");
			return 1;
		}
	}
	return 0;
}
