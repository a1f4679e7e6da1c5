// SPDX-License-Identifier: GPL-2.0
/* Errors, parsing, time, pinning, and the markers. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

static const char *prog_name = "bench";

void bench_init(const char *prog)
{
	prog_name = prog;
	/* A line must reach the host before a panic can swallow it. */
	setvbuf(stdout, NULL, _IOLBF, 0);
}

/* The reason goes to both channels: a log reader and the runner need it. */
void die(const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	fprintf(stderr, "%s: %s\n", prog_name, text);
	json_begin(prog_name);
	json_str("error", text);
	json_end();
	exit(EXIT_UNABLE);
}

void progress(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "%s: ", prog_name);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
}

void *xcalloc(size_t n, size_t size)
{
	void *p = calloc(n, size);

	if (!p)
		die("no memory for %zu bytes", n * size);
	return p;
}

uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

unsigned long parse_ulong(const char *opt, const char *text)
{
	char *end;
	unsigned long val;

	errno = 0;
	val = strtoul(text, &end, 0);
	if (errno || *end || end == text || *text == '-')
		die("%s: not a number: '%s'", opt, text);
	return val;
}

int write_file(const char *path, const char *text)
{
	size_t len = strlen(text);
	int fd, ret = 0;

	fd = open(path, O_WRONLY);
	if (fd < 0)
		return -errno;
	if (write(fd, text, len) != (ssize_t)len)
		ret = -errno;
	close(fd);
	return ret;
}

void require_file(const char *path, const char *text)
{
	int ret = write_file(path, text);

	if (ret)
		die("cannot write '%s' to %s: %s", text, path, strerror(-ret));
}

long read_long(const char *path)
{
	FILE *f = fopen(path, "re");
	long val;

	if (!f)
		return -1;
	if (fscanf(f, "%ld", &val) != 1)
		val = -1;
	fclose(f);
	return val;
}

void pin_to_cpu(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("cannot pin to CPU %d: %s", cpu, strerror(errno));
}

void run_anywhere(void)
{
	cpu_set_t set;

	memset(&set, 0xff, sizeof(set));
	if (sched_setaffinity(0, sizeof(set), &set))
		die("cannot unpin: %s", strerror(errno));
}

/*
 * An mm remembers every CPU it ran on, and x86 batches its TLB flushes only
 * for an mm that ran on more than one. Pinning a process that has already
 * run elsewhere is therefore too late: pin, then start over with a new mm.
 */
void pin_and_reexec(int cpu, char **argv)
{
	pin_to_cpu(cpu);
	if (getenv("BENCH_PINNED"))
		return;
	setenv("BENCH_PINNED", "1", 1);
	execv("/proc/self/exe", argv);
	die("cannot start over on CPU %d: %s", cpu, strerror(errno));
}

int other_online_cpu(int cpu)
{
	long nr = sysconf(_SC_NPROCESSORS_ONLN);

	if (nr < 2)
		die("deferred mode needs two CPUs, this guest has %ld", nr);
	return (cpu + 1) % nr;
}

/* Whatever runs on its own would be counted; what is missing is not there. */
void quiet_guest(void)
{
	write_file("/proc/sys/kernel/numa_balancing", "0");
	write_file("/proc/sys/vm/stat_interval", "3600");
	write_file("/proc/sys/vm/compaction_proactiveness", "0");
	/*
	 * The kernel tunes how many free pages a CPU keeps, and what it does
	 * not keep goes through the buddy lists at up to 200 instructions a
	 * page. Let it keep what it may at most.
	 */
	write_file("/proc/sys/vm/percpu_pagelist_high_fraction", "8");
	write_file("/sys/kernel/mm/ksm/run", "0");
	write_file("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs",
		   "3600000");
	write_file("/sys/kernel/mm/numa/demotion_enabled", "false");
}

int mark_start(void)
{
	static int interval;

	syscall(SYS_sched_get_priority_min, 0);
	return interval++;
}

void mark_end(void)
{
	syscall(SYS_sched_get_priority_max, 0);
}
