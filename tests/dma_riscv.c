// SPDX-License-Identifier: GPL-2.0
/*
 * The first program of a riscv64 guest with a DMA engine: memory is migrated back
 * and forth by it, and looked at. Prints a line for each thing that is checked, and
 * "RESULT: passed" or "RESULT: FAILED" in the end. See tests/dma-riscv.
 *
 * With the argument "count", where one instruction takes one nanosecond: how many
 * does who migrates execute for each page, with the device and without it?
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE		4096UL
#define THP		(2UL << 20)
#define MB		(1UL << 20)
#define MPOL_MF_MOVE	2
#define SWITCHES	"/sys/kernel/mm/migrate_copy/"

static bool failed;

static void check_equal(const char *what, long is, long should_be)
{
	const bool good = is == should_be;

	printf("%s: %s: %ld, should be %ld\n", good ? "ok" : "FAILED", what, is, should_be);
	failed |= !good;
}

static bool put(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY);
	bool good = fd >= 0 && write(fd, value, strlen(value)) == (ssize_t)strlen(value);

	if (fd >= 0)
		close(fd);
	return good;
}

static long number(const char *path)
{
	FILE *file = fopen(path, "r");
	long value = -1;

	if (file && fscanf(file, "%ld", &value) != 1)
		value = -1;
	if (file)
		fclose(file);
	return value;
}

static long vmstat(const char *name)
{
	FILE *file = fopen("/proc/vmstat", "r");
	long value, found = -1;
	char key[64];

	while (file && fscanf(file, "%63s %ld", key, &value) == 2)
		if (!strcmp(key, name))
			found = value;
	if (file)
		fclose(file);
	return found;
}

/* Interrupts of the DMA engine that say "done", of all channels and CPUs. */
static long interrupts(void)
{
	FILE *file = fopen("/proc/interrupts", "r");
	char line[512];
	long sum = 0;

	while (file && fgets(line, sizeof(line), file)) {
		char *at = strchr(line, ':'), *end;

		if (!at || !strstr(line, "dma"))
			continue;
		for (at++;; at = end) {
			long n = strtol(at, &end, 10);

			if (end == at)
				break;
			sum += n;
		}
	}
	if (file)
		fclose(file);
	return sum;
}

static uint64_t word_of(size_t at)
{
	return (at + 1) * 0x9e3779b97f4a7c15UL;
}

static size_t wrong_words(const uint64_t *mem, size_t len)
{
	size_t wrong = 0;

	for (size_t at = 0; at < len / 8; at++)
		wrong += mem[at] != word_of(at);
	return wrong;
}

static long pages_at(char *mem, size_t len, int node)
{
	long nr = 0;

	for (size_t at = 0; at < len; at += PAGE) {
		void *page = mem + at;
		int status = -1;

		syscall(SYS_move_pages, 0, 1, &page, NULL, &status, 0);
		nr += status == node;
	}
	return nr;
}

/* One call for all of it: the kernel makes batches. */
static void move(char *mem, size_t len, size_t folio, int node)
{
	const size_t nr = len / folio;
	void **pages = calloc(nr, sizeof(*pages));
	int *nodes = calloc(nr, sizeof(*nodes)), *status = calloc(nr, sizeof(*status));

	for (size_t i = 0; i < nr; i++) {
		pages[i] = mem + i * folio;
		nodes[i] = node;
	}
	if (syscall(SYS_move_pages, 0, nr, pages, nodes, status, MPOL_MF_MOVE))
		perror("move_pages");
	free(pages);
	free(nodes);
	free(status);
}

static char *make(size_t len, size_t folio)
{
	unsigned long node0 = 1;
	char *mem = mmap(NULL, len + THP, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	mem = (char *)(((uintptr_t)mem + THP - 1) & ~(THP - 1));
	madvise(mem, len, folio == THP ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	/* MPOL_PREFERRED: only where it is made, then it may go */
	syscall(SYS_set_mempolicy, 1, &node0, 8 * sizeof(node0));
	for (size_t at = 0; at < len / 8; at++)
		((uint64_t *)mem)[at] = word_of(at);
	syscall(SYS_set_mempolicy, 0, NULL, 0);
	return mem;
}

struct counts {
	long folios, pages, bulk, interrupts, fellback, timeouts;
};

static struct counts counts(void)
{
	return (struct counts) {
		vmstat("migrate_copy_dma"), vmstat("migrate_copy_dma_pages"),
		vmstat("pgmigrate_success"), interrupts(),
		vmstat("migrate_copy_fellback"), vmstat("migrate_copy_dma_timeouts"),
	};
}

/* @parts: how many descriptors a folio takes. */
static void test(const char *name, size_t len, size_t folio, long parts)
{
	char *mem = make(len, folio);
	struct counts before, after;

	printf("# %s: %zu MiB\n", name, len / MB);
	for (int round = 1; round <= 4; round++) {
		before = counts();
		move(mem, len, folio, round & 1);
		after = counts();
		check_equal("pages that are where they should be",
			    pages_at(mem, len, round & 1), len / PAGE);
		check_equal("wrong words", wrong_words((uint64_t *)mem, len), 0);
		check_equal("bytes copied by the device",
			    (after.pages - before.pages) * PAGE, len);
		check_equal("pages migrated", after.bulk - before.bulk, len / PAGE);
		check_equal("interrupts of the device", after.interrupts - before.interrupts,
			    parts * (after.folios - before.folios));
		check_equal("copied by the CPU after all", after.fellback - before.fellback, 0);
		check_equal("not in time", after.timeouts - before.timeouts, 0);
	}
	munmap(mem, len);
}

/* That of the task alone: it sleeps while the device copies. */
static long cpu_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return ts.tv_sec * 1000000000L + ts.tv_nsec;
}

/* Instructions for each page, the least of some moves. */
static long count(char *mem, size_t len, const char *engine)
{
	long least = -1;

	check_equal("the engine can be chosen", put(SWITCHES "engine", engine), 1);
	for (int round = 1; round <= 6; round++) {
		const long begin = cpu_ns();
		long ns;

		move(mem, len, THP, round & 1);
		ns = cpu_ns() - begin;
		if (round > 2 && (least < 0 || ns < least))
			least = ns;
	}
	check_equal("wrong words", wrong_words((uint64_t *)mem, len), 0);
	return least / (long)(len / PAGE);
}

/* To copy a page is to load and to store each of its words. */
static void count_instructions(void)
{
	const size_t len = 16 * MB;
	char *mem = make(len, THP);
	const long off = count(mem, len, "off"), dma = count(mem, len, "dma");
	const long copy = 2 * PAGE / 8;

	printf("# instructions for each page of THPs: %ld without an engine, %ld with dma\n",
	       off, dma);
	check_equal("instructions that copy a page, at least, are gone",
		    off - dma >= copy * 9 / 10 && off >= copy, 1);
	munmap(mem, len);
}

static void test_all(void)
{
	test("pages", 8 * MB, PAGE, 1);
	/* Its four channels share a THP. */
	test("THPs", 16 * MB, THP, 4);
}

int main(int argc, char **argv)
{
	mkdir("/proc", 0555);
	mkdir("/sys", 0555);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sys", "/sys", "sysfs", 0, NULL);
	setvbuf(stdout, NULL, _IOLBF, 0);
	put("/sys/kernel/mm/transparent_hugepage/enabled", "madvise");
	/* An emulated device, on a machine that may be busy. */
	put(SWITCHES "dma_timeout_ms", "10000");
	check_equal("the engine can be switched on", put(SWITCHES "engine", "dma"), 1);
	if (argc > 1 && !strcmp(argv[1], "count"))
		count_instructions();
	else
		test_all();
	check_equal("the engine can be switched off", put(SWITCHES "engine", "off"), 1);
	check_equal("bytes in quarantine", number(SWITCHES "dma_quarantined"), 0);
	printf("RESULT: %s\n", failed ? "FAILED" : "passed");
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}
