// SPDX-License-Identifier: GPL-2.0
/*
 * Demotion in batches: reclaim of a node that has a slower one below it migrates as
 * many pages at once as are wanted, up to 512, and no more of them than that.
 *
 * Mutants of the kernel that are caught here:
 *   demote.batches	no more than 32 pages are isolated at once
 *   demote.no_more	512 are, however few are wanted
 *   demote.isolated	only the first of them are counted as isolated
 *
 * Needs two memory tiers and cgroup v2 in /sys/fs/cgroup.
 */
#include <sys/mman.h>
#include <sys/stat.h>
#include "migrate_util.h"
#include "kselftest_harness.h"

#define CGROUP		"/sys/fs/cgroup/demote_batch/"
#define DEMOTION	"/sys/kernel/mm/numa/demotion_enabled"
#define EVENT		"/sys/kernel/tracing/events/migrate/mm_migrate_pages/"
#define REFRESH		"/proc/sys/vm/stat_refresh"
#define NR_PAGES	32768
#define NR_WORDS	(4096 / sizeof(uint64_t))

static bool put_str(const char *path, const char *value)
{
	const int fd = open(path, O_WRONLY | O_CLOEXEC);
	const bool good = fd >= 0 && write(fd, value, strlen(value)) > 0;

	close(fd);
	return good;
}

static long demoted(void)
{
	return read_named("/proc/vmstat", "pgdemote_proactive");
}

/* Takes @kb from the cgroup, as far as there is that much. */
static void take(long kb)
{
	char amount[32];

	snprintf(amount, sizeof(amount), "%ldK", kb);
	put_str(CGROUP "memory.reclaim", amount);
}

static uint64_t pattern(size_t page, size_t word)
{
	return (page << 16 | word) * 0x9e3779b97f4a7c15ULL;
}

static size_t wrong_pages(uint64_t *mem)
{
	size_t wrong = 0, page, word;

	for (page = 0; page < NR_PAGES; page++) {
		for (word = 0; word < NR_WORDS; word++)
			if (mem[page * NR_WORDS + word] != pattern(page, word))
				break;
		wrong += word < NR_WORDS;
	}
	return wrong;
}

/* How often we have called migrate_pages() since the trigger was set. */
static long migrations(void)
{
	char line[256];
	long hits = 0;
	int pid;
	FILE *file = fopen(EVENT "hist", "r");

	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "{ common_pid: %d } hitcount: %ld", &pid, &hits) == 2 &&
		    pid == getpid())
			break;
	if (file)
		fclose(file);
	return hits;
}

FIXTURE(demote) {
	int node[2];
	uint64_t *mem;
};

static const char *set_up(int *node)
{
	char cpus[64] = "";

	if (!two_nodes(node))
		return "needs two nodes with memory";
	read_file("/sys/devices/system/node/has_cpu", cpus, sizeof(cpus));
	if (strspn(cpus, "0123456789") != strcspn(cpus, "\n"))
		return "needs a node without CPUs, of a slower tier";
	if (!put_str(DEMOTION, "1"))
		return "no demotion";
	put_str("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	if (mkdir(CGROUP, 0755) && errno != EEXIST)
		return "no cgroup v2 in /sys/fs/cgroup";
	if (access(CGROUP "memory.reclaim", W_OK))
		return "no memory.reclaim";
	return NULL;
}

FIXTURE_SETUP(demote)
{
	const char *why = set_up(self->node);
	const size_t len = NR_PAGES * psize();
	unsigned long mask;

	if (why)
		SKIP(return, "%s", why);
	ASSERT_TRUE(put_str(CGROUP "cgroup.procs", "0"));
	mask = 1UL << self->node[0];
	syscall(__NR_set_mempolicy, MPOL_PREFERRED, &mask, 8 * sizeof(mask));
	self->mem = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(self->mem, len, MADV_NOHUGEPAGE);
	for (size_t page = 0; page < NR_PAGES; page++)
		for (size_t word = 0; word < NR_WORDS; word++)
			self->mem[page * NR_WORDS + word] = pattern(page, word);
	/* From the lists of the CPUs to those that reclaim looks at */
	write_num("/proc/sys/vm/compact_memory", 1);
	put_str(EVENT "trigger", "hist:keys=common_pid");
}

FIXTURE_TEARDOWN(demote)
{
	if (!self->mem)
		return;
	put_str(EVENT "trigger", "!hist:keys=common_pid");
	EXPECT_EQ(wrong_pages(self->mem), 0);
	put_str("/sys/fs/cgroup/cgroup.procs", "0");
	munmap(self->mem, NR_PAGES * psize());
	put_str(DEMOTION, "0");
	rmdir(CGROUP);
}

/* Many are wanted: there are many in a batch. And all counters tell the same. */
TEST_F(demote, batches)
{
	const long before = demoted(), calls = migrations();
	const long charged = read_named(CGROUP "memory.stat", "pgdemote_proactive");
	const long wanted = NR_PAGES / 2;
	long nr;

	if (access(EVENT "hist", R_OK))
		SKIP(return, "no histograms of trace events");
	take(wanted * psize() / 1024);
	nr = demoted() - before;
	EXPECT_GE(nr, wanted * 9 / 10);
	EXPECT_LE(nr, wanted + 64);
	EXPECT_LE(migrations() - calls, nr / 100);
	EXPECT_EQ(read_named(CGROUP "memory.stat", "pgdemote_proactive") - charged, nr);
	TH_LOG("%ld pages by %ld calls of migrate_pages()", nr, migrations() - calls);
}

/* Few are wanted: no more are demoted, whatever fits a batch. */
TEST_F(demote, no_more)
{
	long before, most = 0;

	for (int i = 0; i < 20; i++) {
		before = demoted();
		take(16 * psize() / 1024);
		if (demoted() - before > most)
			most = demoted() - before;
	}
	EXPECT_GE(most, 16);
	EXPECT_LE(most, 64);
	TH_LOG("%ld pages at most where 16 are wanted", most);
}

/* Does the kernel say that it has counted too few? /proc/vmstat has a zero then. */
static bool counted_too_few(void)
{
	const int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	char line[1024];
	bool found = false;
	ssize_t len;

	lseek(fd, 0, SEEK_END);
	write_num(REFRESH, 1);
	while ((len = read(fd, line, sizeof(line) - 1)) > 0) {
		line[len] = '\0';
		found |= !!strstr(line, "vmstat_refresh: nr_isolated_");
	}
	close(fd);
	return found;
}

/* Nothing stays isolated, and none has been counted twice or not at all. */
TEST_F(demote, isolated)
{
	for (int i = 0; i < 8; i++) {
		take(NR_PAGES / 16 * psize() / 1024);
		EXPECT_FALSE(counted_too_few());
		EXPECT_EQ(read_named("/proc/vmstat", "nr_isolated_anon"), 0);
		EXPECT_EQ(read_named("/proc/vmstat", "nr_isolated_file"), 0);
	}
}

TEST_HARNESS_MAIN
