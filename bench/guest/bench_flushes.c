// SPDX-License-Identifier: GPL-2.0
/*
 * Counts TLB flushes that migration sends to other CPUs, while these read what is
 * migrated: by move_pages() or mbind() in calls of some pages, or by demotion of
 * a file that does not fit the node. Counts, no times: how many pages one flush
 * is for does not depend on how fast the machine is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"

#define PROG	"bench_flushes"
#define WORDS	(BASE_PAGE / sizeof(uint64_t))
#define MAX_CPUS 64

enum how { MOVE, MBIND, DEMOTE, PROACTIVE };

static const char * const how_names[] = { "move", "mbind", "demote", "proactive" };

static const char *path = "/disk/flushes";
static unsigned long size_kb = 4096, call = 8, rounds = 4, again = 100, rest_us;
static enum how how = MOVE;

static size_t nr_pages;
static volatile uint64_t *mem;
static atomic_bool stop;
static atomic_size_t nr_read;		/* of so many pages, from the beginning */
static atomic_ulong passes[MAX_CPUS];
static int nr_readers;

static void usage(void)
{
	fprintf(stderr,
"usage: bench_flushes [option...]\n"
"  --how move          move_pages(), to and fro between nodes 0 and 1 (default)\n"
"        mbind         mbind(MPOL_MF_MOVE) instead\n"
"        demote        a CPU reads a file that does not fit node 0, others what it\n"
"                      has read; they may have memory of node 0 only\n"
"        proactive     half of a file that others have mapped and read is demoted,\n"
"                      by memory.reclaim of a cgroup, while they read the rest\n"
"  --kb N              size of the file (4096)\n"
"  --call N            pages moved by one call (8)\n"
"  --rounds N          how often everything is moved (4)\n"
"  --again N           demote: pages read again for each new one (100)\n"
"  --rest US           move, mbind: readers sleep as long after each pass (0)\n"
"  --file PATH         where the file is made (/disk/flushes)\n");
	exit(EXIT_UNABLE);
}

static void parse(int argc, char **argv)
{
	static const struct option opts[] = {
		{ "how", required_argument, NULL, 'h' },
		{ "kb", required_argument, NULL, 'k' },
		{ "call", required_argument, NULL, 'c' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "again", required_argument, NULL, 'a' },
		{ "rest", required_argument, NULL, 's' },
		{ "file", required_argument, NULL, 'f' },
		{ }
	};
	size_t i;
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 'h':
			for (i = 0; i < ARRAY_SIZE(how_names); i++)
				if (!strcmp(optarg, how_names[i]))
					break;
			if (i == ARRAY_SIZE(how_names))
				usage();
			how = i;
			break;
		case 'k': size_kb = parse_ulong("--kb", optarg); break;
		case 'c': call = parse_ulong("--call", optarg); break;
		case 'r': rounds = parse_ulong("--rounds", optarg); break;
		case 'a': again = parse_ulong("--again", optarg); break;
		case 's': rest_us = parse_ulong("--rest", optarg); break;
		case 'f': path = optarg; break;
		default: usage();
		}
	}
	nr_pages = size_kb * KB / BASE_PAGE;
	atomic_store(&nr_read, nr_pages);
	if (optind != argc || !nr_pages || !call)
		usage();
}

static void bind_to(int node)
{
	unsigned long mask = 1UL << node;

	if (syscall(SYS_set_mempolicy, node < 0 ? MPOL_DEFAULT : MPOL_BIND,
		    node < 0 ? NULL : &mask, node < 0 ? 0 : 64))
		die("set_mempolicy: %s", strerror(errno));
}

/*
 * Each page has its number in its first word. Nobody has it open afterwards; what
 * is to be demoted comes from the disk.
 */
static void make_file(void)
{
	const int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC |
			    (how >= DEMOTE ? O_DIRECT : 0), 0600);
	const size_t chunk = nr_pages % 256 ? 1 : 256;
	/* ext4 has no large folios for it then: published figures are of pages */
	const int flags = FS_EXTENT_FL | FS_JOURNAL_DATA_FL;
	uint64_t *buf;
	size_t i;

	if (fd < 0 || posix_memalign((void **)&buf, BASE_PAGE, chunk * BASE_PAGE))
		die("%s: %s", path, strerror(errno));
	memset(buf, 0, chunk * BASE_PAGE);
	for (i = 0; i < nr_pages; i++) {
		buf[i % chunk * WORDS] = i;
		if ((i + 1) % chunk)
			continue;
		if (write(fd, buf, chunk * BASE_PAGE) != (ssize_t)(chunk * BASE_PAGE))
			die("%s: %s", path, strerror(errno));
	}
	if (fsync(fd) || ioctl(fd, FS_IOC_SETFLAGS, &flags))
		die("%s: %s", path, strerror(errno));
	close(fd);
	free(buf);
}

static void map_file(void)
{
	const int fd = open(path, O_RDONLY | O_CLOEXEC);

	mem = mmap(NULL, nr_pages * BASE_PAGE, PROT_READ, MAP_SHARED, fd, 0);
	if (fd < 0 || mem == MAP_FAILED)
		die("%s: %s", path, strerror(errno));
	close(fd);
}

static void check(size_t page)
{
	if (mem[page * WORDS] != page)
		die("page %zu has %llx", page, (unsigned long long)mem[page * WORDS]);
}

static void *read_all_the_time(void *arg)
{
	const int nr = (intptr_t)arg;
	size_t i;

	pin_to_cpu(nr);
	while (!atomic_load(&stop)) {
		for (i = 0; i < atomic_load(&nr_read); i++)
			check(i);
		atomic_fetch_add(&passes[nr], 1);
		if (rest_us)
			usleep(rest_us);
	}
	return NULL;
}

/* How far the file has been read. */
static atomic_ulong so_far;

static size_t some_page(uint64_t *seed, size_t below)
{
	*seed = *seed * 6364136223846793005ULL + 1442695040888963407ULL;
	return (*seed >> 16) % below;
}

/*
 * The first one reads what is new, others what has been read, anywhere; and so does
 * the first one, many times for each new page: kswapd is to keep up with it.
 */
static void *read_on(void *arg)
{
	const size_t nr = (intptr_t)arg;
	uint64_t seed = nr;
	size_t i, k;

	pin_to_cpu(nr);
	for (i = 0; !nr && i < nr_pages; i++) {
		check(i);
		atomic_store(&so_far, i + 1);
		for (k = 0; k < again; k++)
			check(some_page(&seed, i + 1));
	}
	while (nr && (i = atomic_load(&so_far)) < nr_pages)
		if (i)
			check(some_page(&seed, i));
	return NULL;
}

static void start(pthread_t *threads, void *(*fn)(void *), int first)
{
	int i;

	nr_readers = sysconf(_SC_NPROCESSORS_ONLN);
	for (i = first; i < nr_readers; i++)
		if (pthread_create(&threads[i], NULL, fn, (void *)(intptr_t)i))
			die("pthread_create: %s", strerror(errno));
}

static void wait_for_readers(void)
{
	int i;

	for (i = 1; i < nr_readers; i++)
		while (!atomic_load(&passes[i]))
			usleep(1000);
}

/* Returns how many pages are on @node afterwards. */
static size_t move(size_t first, size_t nr, int node)
{
	static void *pages[4096];
	static int nodes[4096], status[4096];
	size_t i, there = 0;

	for (i = 0; i < nr; i++) {
		pages[i] = (void *)(mem + (first + i) * WORDS);
		nodes[i] = node;
	}
	if (syscall(SYS_move_pages, 0, nr, pages, nodes, status, MPOL_MF_MOVE) < 0)
		die("move_pages: %s", strerror(errno));
	for (i = 0; i < nr; i++)
		there += status[i] == node;
	return there;
}

static void bind_pages(size_t first, size_t nr, int node)
{
	unsigned long mask = 1UL << node;

	if (syscall(SYS_mbind, mem + first * WORDS, nr * BASE_PAGE, MPOL_BIND, &mask,
		    64, MPOL_MF_MOVE))
		die("mbind: %s", strerror(errno));
}

static size_t move_all(int node)
{
	size_t i, there = 0;

	for (i = 0; i < nr_pages; i += call) {
		const size_t nr = call < nr_pages - i ? call : nr_pages - i;

		if (how == MBIND)
			bind_pages(i, nr, node);
		else
			there += move(i, nr, node);
	}
	return there;
}

static void report(const struct stats *a, const struct stats *b, size_t there)
{
	json_begin(PROG);
	json_str("how", how_names[how]);
	json_int("kb", size_kb);
	json_int("call", call);
	json_int("cpus", nr_readers);
	json_int("moved", there);
	json_int("flushes", stat_delta(a, b, "nr_tlb_remote_flush"));
	json_int("received", stat_delta(a, b, "nr_tlb_remote_flush_received"));
	json_int("migrated", stat_delta(a, b, "pgmigrate_success"));
	json_delta("vmstat", a, b);
	json_end();
}

static void move_rounds(void)
{
	pthread_t threads[MAX_CPUS];
	struct stats a, b;
	size_t there = 0;
	unsigned long r;

	bind_to(0);
	make_file();
	bind_to(-1);
	map_file();
	pin_to_cpu(0);
	start(threads, read_all_the_time, 1);
	wait_for_readers();
	move_all(1);
	drain_lru();
	vmstat_read(&a);
	for (r = 0; r < rounds; r++)
		there += move_all(r % 2);
	vmstat_read(&b);
	atomic_store(&stop, true);
	for (int i = 1; i < nr_readers; i++)
		pthread_join(threads[i], NULL);
	report(&a, &b, there);
}

static size_t demoted(const struct stats *a, const struct stats *b)
{
	return stat_delta(a, b, "pgdemote_kswapd") + stat_delta(a, b, "pgdemote_direct") +
	       stat_delta(a, b, "pgdemote_proactive");
}

static void demote(void)
{
	pthread_t threads[MAX_CPUS];
	struct stats a, b;

	make_file();
	require_file("/sys/kernel/mm/numa/demotion_enabled", "1");
	map_file();
	/* Threads inherit it */
	bind_to(0);
	vmstat_read(&a);
	start(threads, read_on, 0);
	for (int i = 0; i < nr_readers; i++)
		pthread_join(threads[i], NULL);
	vmstat_read(&b);
	report(&a, &b, demoted(&a, &b));
}

/* One of our own: what it uses is charged to it. */
#define CGROUP	"/sys/fs/cgroup/flushes/"

static void enter_cgroup(void)
{
	mount("none", "/sys/fs/cgroup", "cgroup2", 0, NULL);
	require_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	if (mkdir(CGROUP, 0755) && errno != EEXIST)
		die(CGROUP ": %s", strerror(errno));
	require_file(CGROUP "cgroup.procs", "0");
}

static void demote_half(void)
{
	pthread_t threads[MAX_CPUS];
	struct stats a, b;
	char half[32];

	enter_cgroup();
	make_file();
	require_file("/sys/kernel/mm/numa/demotion_enabled", "1");
	map_file();
	bind_to(0);
	pin_to_cpu(0);
	start(threads, read_all_the_time, 1);
	wait_for_readers();
	/* All of it is mapped; what they go on reading is the other half */
	atomic_store(&nr_read, nr_pages / 2);
	drain_lru();
	snprintf(half, sizeof(half), "%luK", size_kb / 2);
	vmstat_read(&a);
	/* It fails if it was less in the end */
	write_file(CGROUP "memory.reclaim", half);
	vmstat_read(&b);
	atomic_store(&stop, true);
	for (int i = 1; i < nr_readers; i++)
		pthread_join(threads[i], NULL);
	report(&a, &b, demoted(&a, &b));
}

int main(int argc, char **argv)
{
	bench_init(PROG);
	parse(argc, argv);
	if (how == DEMOTE)
		demote();
	else if (how == PROACTIVE)
		demote_half();
	else
		move_rounds();
	unlink(path);
	return 0;
}
