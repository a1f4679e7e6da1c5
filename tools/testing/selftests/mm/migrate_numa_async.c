// SPDX-License-Identifier: GPL-2.0
/*
 * NUMA balancing in the background (kernel.numa_balancing_async): what is wanted on
 * a node gets there, unchanged; what has been queued is not migrated if it has become
 * something else meanwhile, or if a policy forbids it; and all of it is counted.
 *
 * Memory is on one node, the task that uses it on another one. Most tests have the
 * kernel keep hints waiting (debugfs, "paused"), have something happen, and let it go
 * on. When a test ends, counters must add up, and nothing may be isolated.
 *
 * Mutants of the kernel that are caught here:
 *   async.reused		a hint is good for whatever is at its PFN now
 *   voids.nothing_leaves	void hints are used; or those of a shared file are
 *   async.relatives		or those of a parent
 *   flight.is_waited_for	who changes a policy does not wait for a batch
 *   async.cgroups		pages are counted for the cgroup of their sources
 *   async.ring_of_two		a full ring takes more
 *   async.too_few		few at a time are queued, too
 *   async.expires		hints are good for ever
 *   async.dirty_file		what has become dirty is migrated
 *   async.cpuset_is_sync	tasks queue for nodes that they may not use
 *   async.policy_is_sync	or memory that has a policy
 *   async.private_shmem_is_sync  or of a file that may have one
 *   async.partially_mapped	what is partially mapped is split and migrated
 *   async.switched_off		hints outlive the thread
 *   async.cpu_offline		those of a CPU that is offline are not looked at
 *   async.converges		the thread is not woken
 *   async.binds_something_else	a policy voids all hints of a process
 *   async.lags			a thread that is late is waited for
 *   async.failures		tasks do not migrate for themselves when much fails
 */
#define _GNU_SOURCE
#include <pthread.h>
#include "numa_async.h"
#include "kselftest_harness.h"

#define CGROUP		"/sys/fs/cgroup/numa_async_"
#define FAULTS		"/sys/kernel/debug/fail_page_alloc/"
#define KSM		"/sys/kernel/mm/ksm/"
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif
/* Fewer than fit in a ring */
#define NR_SOME		128

FIXTURE(async) {
	struct balancing numa;
	int from, to;
};

FIXTURE_SETUP(async)
{
	const char *why = start(&self->numa, true);

	if (why)
		SKIP(return, "%s", why);
	self->from = self->numa.node[0];
	self->to = self->numa.node[1];
}

FIXTURE_TEARDOWN(async)
{
	EXPECT_TRUE(stop(&self->numa));
}

/* Memory gets to where it is used, many folios at once. */
TEST_F_TIMEOUT(async, converges, 120)
{
	const size_t nr = 4096;
	const long batches = event("numa_async_batches");
	const long migrated = event("numa_async_migrated");
	char *mem;

	/* Where a fault takes a millisecond, there are not so many in four */
	put(LIMITS "smallest_batch", 8);
	put(LIMITS "hold_ms", 100);
	mem = memory_on(self->from, self->to, nr, -1);
	ASSERT_NE(mem, NULL);
	EXPECT_TRUE(converge(mem, nr, self->to));
	EXPECT_EQ(wrong_pages(mem, nr), 0);
	ASSERT_TRUE(settle());
	EXPECT_GT(event("numa_async_migrated") - migrated, nr / 4);
	EXPECT_GE(event("numa_async_migrated") - migrated,
		  16 * (event("numa_async_batches") - batches));
}

/* Switched off, nothing is queued, and memory gets there all the same. */
TEST_F_TIMEOUT(async, off, 120)
{
	const size_t nr = 2048;
	long queued;
	char *mem;

	put(SWITCH, 0);
	queued = event("numa_async_queued");
	mem = memory_on(self->from, self->to, nr, -1);
	EXPECT_TRUE(converge(mem, nr, self->to));
	EXPECT_EQ(wrong_pages(mem, nr), 0);
	EXPECT_EQ(event("numa_async_queued"), queued);
}

/* What does not fit is migrated by the task. */
TEST_F_TIMEOUT(async, ring_of_two, 120)
{
	const size_t nr = 1024;
	const long full = event("numa_async_sync_full");
	long queued;
	char *mem;

	put(LIMITS "ring_size", 2);
	ASSERT_TRUE(settle());
	pause_it(true);
	mem = memory_on(self->from, self->to, nr, -1);
	queued = event("numa_async_queued");
	EXPECT_TRUE(converge(mem, nr, self->to));
	EXPECT_GT(event("numa_async_sync_full") - full, nr / 2);
	/* Of each CPU */
	EXPECT_LE(event("numa_async_queued") - queued, 2 * sysconf(_SC_NPROCESSORS_CONF));
	ASSERT_TRUE(resume());
	EXPECT_EQ(wrong_pages(mem, nr), 0);
}

/* A few at a time are not worth a flush. */
TEST_F_TIMEOUT(async, too_few, 120)
{
	const size_t nr = 256;
	const long small = event("numa_async_sync_small");
	const double end = now() + SECONDS;
	long queued;
	char *mem;

	put(LIMITS "smallest_batch", 64);
	put(LIMITS "hold_ms", 1);
	mem = memory_on(self->from, self->to, nr, -1);
	queued = event("numa_async_queued");
	/* Never as many as that within two periods of a tick */
	for (size_t i = 0; i < nr && now() < end; i = nr_on(mem, nr, self->to)) {
		for (size_t page = 0; page < nr; page += 16) {
			const double then = now() + 0.02;

			touch(mem + page * psize(), 16);
			/* Only who runs is looked after by NUMA balancing */
			while (now() < then)
				;
		}
	}
	EXPECT_GT(event("numa_async_sync_small") - small, nr / 2);
	EXPECT_LT(event("numa_async_queued") - queued, nr / 4);
}

/* Hints that nobody has come to are not used. */
TEST_F_TIMEOUT(async, expires, 120)
{
	const long expired = event("numa_async_expired");
	char *mem = memory_on(self->from, self->to, NR_SOME, -1);
	double begun;

	pause_it(true);
	ASSERT_TRUE(queue(mem, NR_SOME, NR_SOME));
	/* Nobody asks for them any more */
	put("/proc/sys/kernel/numa_balancing", 0);
	put(LIMITS "ttl_ms", 20);
	begun = now();
	while (now() < begun + 0.2)
		poll(NULL, 0, 10);
	ASSERT_TRUE(resume());
	EXPECT_GE(event("numa_async_expired") - expired, NR_SOME);
	EXPECT_EQ(nr_on(mem, NR_SOME, self->from), NR_SOME);
	EXPECT_EQ(wrong_pages(mem, NR_SOME), 0);
}

/* A thread that does not come to it is not waited for. */
TEST_F_TIMEOUT(async, lags, 120)
{
	const size_t nr = 1024;
	const long lagging = event("numa_async_sync_lagging");
	char *mem = memory_on(self->from, self->to, nr, -1);

	pause_it(true);
	put(LIMITS "ttl_ms", 40);
	ASSERT_TRUE(queue(mem, nr, 1));
	EXPECT_TRUE(converge(mem, nr, self->to));
	EXPECT_GT(event("numa_async_sync_lagging"), lagging);
	EXPECT_TRUE(resume());
	EXPECT_EQ(wrong_pages(mem, nr), 0);
}

static uint64_t pfn_of(void *addr)
{
	const int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry = 0;

	if (pread(fd, &entry, sizeof(entry), (uintptr_t)addr / psize() * sizeof(entry)) !=
	    sizeof(entry))
		entry = 0;
	close(fd);
	return entry >> 63 ? entry & ((1ULL << 55) - 1) : 0;
}

/* Pages that have become somebody else's stay where they are. */
TEST_F_TIMEOUT(async, reused, 120)
{
	const size_t nr = 4096;
	char *mem = memory_on(self->from, self->to, NR_SOME, -1);
	const long stale = event("numa_async_stale");
	uint64_t pfns[NR_SOME];
	size_t reused = 0;
	char *other;

	/* A policy from the beginning: no hint becomes void when it is used */
	other = mmap(NULL, nr * psize(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		     -1, 0);
	ASSERT_EQ(mbind_node(other, nr * psize(), self->from, 0), 0);
	madvise(other, nr * psize(), MADV_NOHUGEPAGE);

	pause_it(true);
	ASSERT_TRUE(queue(mem, NR_SOME, NR_SOME));
	put("/proc/sys/kernel/numa_balancing", 0);
	for (size_t i = 0; i < NR_SOME; i++)
		pfns[i] = pfn_of(mem + i * psize());
	munmap(mem, NR_SOME * psize());
	fill(other, nr);
	for (size_t i = 0; i < nr; i++) {
		const uint64_t pfn = pfn_of(other + i * psize());

		for (size_t j = 0; j < NR_SOME; j++)
			reused += pfn && pfns[j] == pfn;
	}
	/* Hints are for folios on the LRU, not for those that are about to be there */
	ASSERT_EQ(drain_lru(self->from), 0);
	ASSERT_TRUE(resume());
	EXPECT_EQ(nr_on(other, nr, self->from), nr);
	EXPECT_EQ(wrong_pages(other, nr), 0);
	EXPECT_GE(event("numa_async_stale") - stale, NR_SOME * 3 / 4);
	/* They go back to a list of this CPU, and are the first to come from there */
	EXPECT_GT(reused, 0);
}

/* What is queued when it is switched off is forgotten, and counted. */
TEST_F_TIMEOUT(async, switched_off, 120)
{
	char *mem = memory_on(self->from, self->to, NR_SOME, -1);
	const long expired = event("numa_async_expired");

	pause_it(true);
	ASSERT_TRUE(queue(mem, NR_SOME, NR_SOME));
	put("/proc/sys/kernel/numa_balancing", 0);
	put(SWITCH, 0);
	EXPECT_GE(event("numa_async_expired") - expired, NR_SOME);
	EXPECT_EQ(get(LIMITS "waiting"), 0);
	EXPECT_EQ(nr_on(mem, NR_SOME, self->from), NR_SOME);
}

/* What a CPU has left behind when it goes offline is migrated. */
TEST_F_TIMEOUT(async, cpu_offline, 120)
{
	const long migrated = event("numa_async_migrated");
	const int cpu = cpu_of(self->to) + 1;
	char *mem = memory_on(self->from, self->to, NR_SOME, -1);
	char path[64];

	snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/cpu%d", self->to, cpu);
	if (access(path, F_OK))
		SKIP(return, "needs a node with two CPUs");
	snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/online", cpu);
	pause_it(true);
	run_on_cpu(cpu);
	ASSERT_TRUE(queue(mem, NR_SOME, NR_SOME));
	put("/proc/sys/kernel/numa_balancing", 0);
	run_on(self->to);
	ASSERT_TRUE(put(path, 0));
	EXPECT_TRUE(resume());
	EXPECT_TRUE(put(path, 1));
	EXPECT_GE(event("numa_async_migrated") - migrated, NR_SOME * 3 / 4);
	EXPECT_EQ(wrong_pages(mem, NR_SOME), 0);
}

/* --- what may happen to memory meanwhile ------------------------------------------ */

FIXTURE(churn) {
	struct balancing numa;
	int from, to;
};

FIXTURE_VARIANT(churn) {
	void (*happen)(char *mem, size_t nr);
	bool gone;
	bool folios;
};

static void unmap(char *mem, size_t nr)
{
	munmap(mem, nr * psize());
}

static void dontneed(char *mem, size_t nr)
{
	madvise(mem, nr * psize(), MADV_DONTNEED);
}

static void fork_it(char *mem, size_t nr)
{
	const pid_t pid = fork();

	if (!pid) {
		for (size_t i = 0; i < nr; i += 2)
			mem[i * psize()]++;
		_exit(0);
	}
	waitpid(pid, NULL, 0);
}

static void protect(char *mem, size_t nr)
{
	mprotect(mem, nr * psize(), PROT_NONE);
	mprotect(mem, nr * psize(), PROT_READ | PROT_WRITE);
}

static void page_out(char *mem, size_t nr)
{
	madvise(mem, nr * psize(), MADV_PAGEOUT);
}

static void collapse(char *mem, size_t nr)
{
	madvise(mem, nr * psize(), MADV_COLLAPSE);
}

static void lock_it(char *mem, size_t nr)
{
	mlock(mem, nr * psize());
}

/* Half of each folio elsewhere: PMD-mapped or not, it is split sooner or later. */
static void split(char *mem, size_t nr)
{
	char *to = mmap(NULL, nr * psize(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char command[64];

	mremap(mem, psize(), psize(), MREMAP_MAYMOVE | MREMAP_FIXED, to);
	mremap(to, psize(), psize(), MREMAP_MAYMOVE | MREMAP_FIXED, mem);
	snprintf(command, sizeof(command), "%d,0x%lx,0x%lx,0", getpid(), (long)mem,
		 (long)mem + nr * psize());
	put_str("/sys/kernel/debug/split_huge_pages", command);
	munmap(to, nr * psize());
}

FIXTURE_VARIANT_ADD(churn, munmap) { .happen = unmap, .gone = true };
FIXTURE_VARIANT_ADD(churn, dontneed) { .happen = dontneed, .gone = true };
FIXTURE_VARIANT_ADD(churn, fork) { .happen = fork_it };
FIXTURE_VARIANT_ADD(churn, mprotect) { .happen = protect };
FIXTURE_VARIANT_ADD(churn, pageout) { .happen = page_out };
FIXTURE_VARIANT_ADD(churn, collapse) { .happen = collapse };
FIXTURE_VARIANT_ADD(churn, mlock) { .happen = lock_it };
FIXTURE_VARIANT_ADD(churn, split) { .happen = split, .folios = true };

FIXTURE_SETUP(churn)
{
	const char *why = start(&self->numa, true);

	if (why)
		SKIP(return, "%s", why);
	self->from = self->numa.node[0];
	self->to = self->numa.node[1];
}

FIXTURE_TEARDOWN(churn)
{
	EXPECT_TRUE(stop(&self->numa));
}

/* 64K folios in memory that has room for one THP, on the first node. */
static char *folios_on(int node, int other, size_t nr)
{
	const size_t thp = 2UL << 20;
	char *mem, *aligned;

	run_on(node);
	mem = mmap(NULL, 2 * thp, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED)
		return NULL;
	aligned = (char *)(((uintptr_t)mem + thp - 1) & ~(thp - 1));
	madvise(aligned, thp, MADV_HUGEPAGE);
	fill(aligned, nr);
	run_on(other);
	drain_lru(other);
	return aligned;
}

TEST_F_TIMEOUT(churn, while_waiting, 120)
{
	const size_t nr = variant->folios ? 512 : NR_SOME;
	const long stale = event("numa_async_stale");
	char *mem;

	pause_it(true);
	if (variant->folios) {
		use_folios_of(64 * 1024);
		mem = folios_on(self->from, self->to, nr);
		thp_restore_settings();
	} else {
		mem = memory_on(self->from, self->to, nr, -1);
	}
	ASSERT_NE(mem, NULL);
	ASSERT_TRUE(queue(mem, nr, variant->folios ? 16 : NR_SOME));
	put("/proc/sys/kernel/numa_balancing", 0);
	variant->happen(mem, nr);
	ASSERT_TRUE(resume());
	EXPECT_TRUE(variant->gone ? event("numa_async_stale") - stale >= NR_SOME * 3 / 4 :
				    !wrong_pages(mem, nr));
}

/* The task has gone, or is another one, by the time that its hints are looked at. */
TEST_F_TIMEOUT(async, exit_and_exec, 120)
{
	const long stale = event("numa_async_stale");

	pause_it(true);
	for (int i = 0; i < 2; i++) {
		const pid_t pid = fork();
		int status = -1;

		if (!pid) {
			char *mem = memory_on(self->from, self->to, NR_SOME / 2, -1);

			if (!mem || !queue(mem, NR_SOME / 2, NR_SOME / 2))
				_exit(1);
			if (i)
				execl("/bin/true", "true", NULL);
			_exit(i ? 2 : 0);
		}
		waitpid(pid, &status, 0);
		EXPECT_EQ(status, 0);
	}
	ASSERT_TRUE(resume());
	EXPECT_GE(event("numa_async_stale") - stale, NR_SOME * 3 / 4);
}

/* --- policies ------------------------------------------------------------------------ */

FIXTURE(voids) {
	struct balancing numa;
	int from, to;
	char *mem;
	int fd;
};

FIXTURE_VARIANT(voids) {
	/* Returns 0, or a negative errno if it is not possible here */
	int (*forbid)(char *mem, size_t nr, int from, int to);
	bool shared;
};

static int by_mbind(char *mem, size_t nr, int from, int to)
{
	return mbind_node(mem, nr * psize(), from, 0) ? -errno : 0;
}

static int by_mbind_strict(char *mem, size_t nr, int from, int to)
{
	return mbind_node(mem, nr * psize(), from, MPOL_MF_MOVE | MPOL_MF_STRICT) ? -errno : 0;
}

static int by_set_mempolicy(char *mem, size_t nr, int from, int to)
{
	const unsigned long mask = 1UL << from;

	return syscall(__NR_set_mempolicy, MPOL_BIND, &mask, 8 * sizeof(mask)) ? -errno : 0;
}

static int by_migrate_pages(char *mem, size_t nr, int from, int to)
{
	const unsigned long old = 1UL << to, new = 1UL << from;

	return syscall(__NR_migrate_pages, 0, 8 * sizeof(old), &old, &new) < 0 ? -errno : 0;
}

/* This task is in a cgroup of its own: see the fixture. */
static int by_cpuset(char *mem, size_t nr, int from, int to)
{
	char buf[16];

	snprintf(buf, sizeof(buf), "%d", from);
	return put_str(CGROUP "a/cpuset.mems", buf) ? 0 : -errno;
}

/* This task gets into another one. */
static int by_attaching(char *mem, size_t nr, int from, int to)
{
	char buf[16];

	snprintf(buf, sizeof(buf), "%d", from);
	put_str("/sys/fs/cgroup/cgroup.subtree_control", "+cpuset");
	if (mkdir(CGROUP "a", 0755) && errno != EEXIST)
		return -errno;
	return put_str(CGROUP "a/cpuset.mems", buf) &&
	       put_str(CGROUP "a/cgroup.procs", "0") ? 0 : -errno;
}

/* Another process that maps the same file. */
static int by_another(char *mem, size_t nr, int from, int to)
{
	const pid_t pid = fork();
	int status = -1;

	if (!pid)
		_exit(mbind_node(mem, nr * psize(), from, 0) ? 1 : 0);
	waitpid(pid, &status, 0);
	return status ? -EIO : 0;
}

FIXTURE_VARIANT_ADD(voids, mbind) { .forbid = by_mbind };
FIXTURE_VARIANT_ADD(voids, mbind_strict) { .forbid = by_mbind_strict };
FIXTURE_VARIANT_ADD(voids, set_mempolicy) { .forbid = by_set_mempolicy };
FIXTURE_VARIANT_ADD(voids, migrate_pages) { .forbid = by_migrate_pages };
FIXTURE_VARIANT_ADD(voids, cpuset) { .forbid = by_cpuset };
FIXTURE_VARIANT_ADD(voids, attaching) { .forbid = by_attaching };
FIXTURE_VARIANT_ADD(voids, shmem) { .forbid = by_mbind, .shared = true };
FIXTURE_VARIANT_ADD(voids, shmem_of_another) { .forbid = by_another, .shared = true };

static bool own_cgroup(const char *name, const char *controllers)
{
	char path[128];

	put_str("/sys/fs/cgroup/cgroup.subtree_control", controllers);
	snprintf(path, sizeof(path), CGROUP "%s", name);
	if (mkdir(path, 0755) && errno != EEXIST)
		return false;
	strcat(path, "/cgroup.procs");
	return put_str(path, "0");
}

static void no_cgroup(const char *name)
{
	char path[128];

	put_str("/sys/fs/cgroup/cgroup.procs", "0");
	snprintf(path, sizeof(path), CGROUP "%s", name);
	rmdir(path);
}

FIXTURE_SETUP(voids)
{
	const char *why = start(&self->numa, true);

	if (why)
		SKIP(return, "%s", why);
	self->from = self->numa.node[0];
	self->to = self->numa.node[1];
	self->fd = -1;
	if ((variant->forbid == by_cpuset && !own_cgroup("a", "+cpuset")) ||
	    (variant->forbid == by_attaching &&
	     access("/sys/fs/cgroup/cpuset.mems.effective", F_OK))) {
		stop(&self->numa);
		SKIP(return, "needs cgroup v2 with cpuset in /sys/fs/cgroup");
	}
	if (variant->shared) {
		self->fd = memfd_create("numa_async", 0);
		ASSERT_EQ(ftruncate(self->fd, NR_SOME * psize()), 0);
	}
	self->mem = memory_on(self->from, self->to, NR_SOME, self->fd);
	ASSERT_NE(self->mem, NULL);
}

FIXTURE_TEARDOWN(voids)
{
	EXPECT_TRUE(stop(&self->numa));
	if (variant->forbid == by_cpuset || variant->forbid == by_attaching)
		no_cgroup("a");
}

TEST_F_TIMEOUT(voids, nothing_leaves, 120)
{
	const long expired = event("numa_async_expired");
	char *mem = self->mem;

	pause_it(true);
	ASSERT_TRUE(queue(mem, NR_SOME, NR_SOME));
	/* What happens then is asked for by nobody but those hints */
	put("/proc/sys/kernel/numa_balancing", 0);
	ASSERT_EQ(variant->forbid(mem, NR_SOME, self->from, self->to), 0);
	ASSERT_EQ(nr_on(mem, NR_SOME, self->from), NR_SOME);
	ASSERT_TRUE(resume());
	EXPECT_EQ(nr_on(mem, NR_SOME, self->from), NR_SOME);
	EXPECT_GE(event("numa_async_expired") - expired, NR_SOME * 3 / 4);
	EXPECT_EQ(wrong_pages(mem, NR_SOME), 0);
}

static bool bind_what_is_left(char *mem, int node)
{
	/* Not ours to wait for: the parent has exited when its pipe is closed */
	return !mbind_node(mem, NR_SOME * psize(), node, MPOL_MF_MOVE | MPOL_MF_STRICT);
}

/*
 * Who has queued it is not there any more; who has the memory now, and forbids it,
 * is another process.
 */
TEST_F_TIMEOUT(async, relatives, 120)
{
	int gone[2], done[2], status;
	char byte = 0;
	pid_t pid;

	ASSERT_EQ(pipe(gone) || pipe(done), 0);
	pause_it(true);
	pid = fork();
	if (!pid) {
		char *mem = memory_on(self->from, self->to, NR_SOME, -1);

		if (!queue(mem, NR_SOME, NR_SOME))
			_exit(1);
		put("/proc/sys/kernel/numa_balancing", 0);
		if (fork())
			_exit(0);
		/* The grandchild: until its parent has been waited for */
		close(gone[1]);
		if (read(gone[0], &byte, 1) != 1 || !bind_what_is_left(mem, self->from))
			_exit(1);
		pause_it(false);
		byte = settle() && nr_on(mem, NR_SOME, self->from) == NR_SOME &&
		       !wrong_pages(mem, NR_SOME);
		_exit(write(done[1], &byte, 1) != 1);
	}
	waitpid(pid, &status, 0);
	ASSERT_EQ(status, 0);
	close(done[1]);
	ASSERT_EQ(write(gone[1], &byte, 1), 1);
	EXPECT_EQ(read(done[0], &byte, 1), 1);
	EXPECT_TRUE(byte);
}

struct binder {
	int node;
	bool stop;
};

/* A policy for memory of its own, again and again. */
static void *bind_all_the_time(void *arg)
{
	struct binder *binder = arg;
	void *page = mmap(NULL, psize(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			  -1, 0);

	*(char *)page = 1;
	while (!__atomic_load_n(&binder->stop, __ATOMIC_RELAXED)) {
		mbind_node(page, psize(), binder->node, 0);
		poll(NULL, 0, 1);
	}
	munmap(page, psize());
	return NULL;
}

/* Most of what is queued is migrated, whoever sets policies for something else. */
static void converge_all_the_same(struct __test_metadata *_metadata, int from, int to)
{
	const size_t nr = 4096;
	long queued, expired, migrated;
	char *mem;

	put(LIMITS "hold_ms", 100);
	mem = memory_on(from, to, nr, -1);
	ASSERT_TRUE(settle());
	queued = event("numa_async_queued");
	expired = event("numa_async_expired");
	migrated = event("numa_async_migrated");
	EXPECT_TRUE(converge(mem, nr, to));
	ASSERT_TRUE(settle());
	queued = event("numa_async_queued") - queued;
	expired = event("numa_async_expired") - expired;
	migrated = event("numa_async_migrated") - migrated;
	TH_LOG("%ld queued, %ld of them expired, %ld migrated", queued, expired, migrated);
	EXPECT_GT(migrated, nr / 4);
	EXPECT_LE(10 * expired, queued);
	EXPECT_EQ(wrong_pages(mem, nr), 0);
}

TEST_F_TIMEOUT(async, others_bind, 120)
{
	struct binder binder = { .node = self->from };
	const pid_t pid = fork();

	if (!pid)
		bind_all_the_time(&binder);
	converge_all_the_same(_metadata, self->from, self->to);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

TEST_F_TIMEOUT(async, binds_something_else, 120)
{
	struct binder binder = { .node = self->from };
	pthread_t thread;

	ASSERT_EQ(pthread_create(&thread, NULL, bind_all_the_time, &binder), 0);
	converge_all_the_same(_metadata, self->from, self->to);
	__atomic_store_n(&binder.stop, true, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
}

FIXTURE(flight) {
	struct balancing numa;
	int from, to;
};

FIXTURE_SETUP(flight)
{
	const char *why = start(&self->numa, true);

	if (why)
		SKIP(return, "%s", why);
	self->from = self->numa.node[0];
	self->to = self->numa.node[1];
}

FIXTURE_TEARDOWN(flight)
{
	EXPECT_TRUE(stop(&self->numa));
}

/* Pages that are isolated are not missed, and come back; for one batch, not for all. */
TEST_F_TIMEOUT(flight, is_waited_for, 120)
{
	const double flight = 0.5;
	char *mem = memory_on(self->from, self->to, NR_SOME, -1);
	double begun;

	pause_it(true);
	put(LIMITS "batch_size", 16);
	ASSERT_TRUE(queue(mem, NR_SOME, NR_SOME));
	put("/proc/sys/kernel/numa_balancing", 0);
	put(DEBUG "flight_ms", flight * 1000);
	pause_it(false);
	/* Until there are pages that are isolated */
	begun = now();
	while (!nr_isolated() && now() < begun + SECONDS)
		sched_yield();
	begun = now();
	EXPECT_EQ(by_mbind_strict(mem, NR_SOME, self->from, self->to), 0);
	EXPECT_EQ(nr_on(mem, NR_SOME, self->from), NR_SOME);
	EXPECT_LT(now() - begun, 2 * flight);
	put(DEBUG "flight_ms", 0);
	ASSERT_TRUE(settle());
	EXPECT_EQ(nr_on(mem, NR_SOME, self->from), NR_SOME);
	EXPECT_EQ(wrong_pages(mem, NR_SOME), 0);
}

/* --- other kinds of memory --------------------------------------------------------- */

/* Explicit policies are for the task to follow, with its VMA locked. */
TEST_F_TIMEOUT(async, policy_is_sync, 120)
{
	const size_t nr = 512;
	const unsigned long both = 1UL << self->from | 1UL << self->to;
	const long policy = event("numa_async_sync_policy");
	long queued;
	char *mem = memory_on(self->from, self->to, nr, -1);

	if (syscall(__NR_mbind, mem, nr * psize(), MPOL_BIND | MPOL_F_NUMA_BALANCING, &both,
		    8 * sizeof(both), 0))
		SKIP(return, "no MPOL_F_NUMA_BALANCING");
	queued = event("numa_async_queued");
	EXPECT_TRUE(converge(mem, nr, self->to));
	EXPECT_EQ(wrong_pages(mem, nr), 0);
	EXPECT_GT(event("numa_async_sync_policy") - policy, nr / 2);
	/* The program and its libraries are queued */
	EXPECT_LT(event("numa_async_queued") - queued, nr / 2);
}

/* Copies of a shmem file's pages: the file's policy, which anybody may change. */
TEST_F_TIMEOUT(async, private_shmem_is_sync, 120)
{
	const size_t nr = 512;
	const long policy = event("numa_async_sync_policy");
	const int fd = memfd_create("numa_async", 0);
	long queued;
	char *mem;

	ASSERT_EQ(ftruncate(fd, nr * psize()), 0);
	run_on(self->from);
	mem = mmap(NULL, nr * psize(), PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	ASSERT_NE(mem, MAP_FAILED);
	fill(mem, nr);
	run_on(self->to);
	drain_lru(self->to);
	queued = event("numa_async_queued");
	EXPECT_TRUE(converge(mem, nr, self->to));
	EXPECT_EQ(wrong_pages(mem, nr), 0);
	EXPECT_GT(event("numa_async_sync_policy") - policy, nr / 2);
	EXPECT_LT(event("numa_async_queued") - queued, nr / 2);
}

/* A task may not have memory where it runs: neither may it have it taken there. */
TEST_F_TIMEOUT(async, cpuset_is_sync, 120)
{
	const long policy = event("numa_async_sync_policy");
	const double end = now() + SECONDS;
	char nodes[16], *mem;

	/* With one node, there is nothing to be balanced */
	snprintf(nodes, sizeof(nodes), "%d,%d", self->from, self->to + 1);
	if (!own_cgroup("a", "+cpuset") || !put_str(CGROUP "a/cpuset.mems", nodes)) {
		no_cgroup("a");
		SKIP(return, "needs cgroup v2 with cpuset in /sys/fs/cgroup, and three nodes");
	}
	mem = memory_on(self->from, self->to, NR_SOME, -1);
	while (event("numa_async_sync_policy") - policy < NR_SOME && now() < end)
		touch(mem, NR_SOME);
	EXPECT_GE(event("numa_async_sync_policy") - policy, NR_SOME);
	EXPECT_TRUE(settle());
	EXPECT_EQ(nr_on(mem, NR_SOME, self->from), NR_SOME);
	EXPECT_EQ(wrong_pages(mem, NR_SOME), 0);
	no_cgroup("a");
}

/* Its pieces would be migrated by themselves: one hint is not so many folios. */
TEST_F_TIMEOUT(async, partially_mapped, 120)
{
	const size_t nr = 512;
	const long stale = event("numa_async_stale");
	char *mem;

	pause_it(true);
	use_folios_of(64 * 1024);
	mem = folios_on(self->from, self->to, nr);
	thp_restore_settings();
	ASSERT_NE(mem, NULL);
	ASSERT_TRUE(queue(mem, nr, nr / 16));
	put("/proc/sys/kernel/numa_balancing", 0);
	for (size_t i = 0; i < nr; i += 16)
		madvise(mem + i * psize(), psize(), MADV_DONTNEED);
	ASSERT_TRUE(resume());
	EXPECT_GE(event("numa_async_stale") - stale, nr / 16 * 3 / 4);
	for (size_t i = 0; i < nr; i++)
		EXPECT_EQ(*(uint64_t *)(mem + i * psize()), i % 16 ? pattern(i, 0) : 0);
}

TEST_F_TIMEOUT(async, large_folios, 120)
{
	const size_t nr = 512;
	long queued;
	char *mem;

	use_folios_of(64 * 1024);
	queued = event("numa_async_queued");
	mem = folios_on(self->from, self->to, nr);
	thp_restore_settings();
	ASSERT_NE(mem, NULL);
	EXPECT_TRUE(converge(mem, nr, self->to));
	EXPECT_EQ(wrong_pages(mem, nr), 0);
	EXPECT_GE(event("numa_async_queued") - queued, 16);
}

/* One THP is a batch by itself. */
TEST_F_TIMEOUT(async, thp_is_sync, 120)
{
	const size_t nr = 512;
	long queued;
	char *mem;

	use_folios_of(2UL << 20);
	queued = event("numa_async_queued");
	mem = folios_on(self->from, self->to, nr);
	thp_restore_settings();
	ASSERT_NE(mem, NULL);
	EXPECT_TRUE(converge(mem, nr, self->to));
	EXPECT_EQ(wrong_pages(mem, nr), 0);
	EXPECT_LT(event("numa_async_queued") - queued, nr / 4);
}

TEST_F_TIMEOUT(async, shmem, 120)
{
	const int fd = memfd_create("numa_async", 0);
	const long migrated = event("numa_async_migrated");
	char *mem;

	ASSERT_EQ(ftruncate(fd, NR_SOME * psize()), 0);
	mem = memory_on(self->from, self->to, NR_SOME, fd);
	EXPECT_TRUE(converge(mem, NR_SOME, self->to));
	EXPECT_EQ(wrong_pages(mem, NR_SOME), 0);
	ASSERT_TRUE(settle());
	EXPECT_GT(event("numa_async_migrated"), migrated);
}

/* Dirty ones wait for who writes them back; it may become so while it waits. */
TEST_F_TIMEOUT(async, dirty_file, 120)
{
	const int fd = open_disk_file(O_RDWR);
	char *mem;

	if (fd < 0)
		SKIP(return, "no disk in MIGRATE_TEST_DIR");
	ASSERT_EQ(ftruncate(fd, NR_SOME * psize()), 0);
	mem = memory_on(self->from, self->to, NR_SOME, fd);
	fsync(fd);
	pause_it(true);
	ASSERT_TRUE(queue(mem, NR_SOME, NR_SOME));
	put("/proc/sys/kernel/numa_balancing", 0);
	fill(mem, NR_SOME);
	ASSERT_TRUE(resume());
	EXPECT_EQ(nr_on(mem, NR_SOME, self->from), NR_SOME);
	EXPECT_EQ(wrong_pages(mem, NR_SOME), 0);
}

/* A pin that comes meanwhile keeps the page; the task is told that it failed. */
TEST_F_TIMEOUT(async, pins, 120)
{
	char *mem = memory_on(self->from, self->to, NR_SOME, -1);
	const long failed = event("numa_async_failed");
	int fd;

	pause_it(true);
	ASSERT_TRUE(queue(mem, NR_SOME, NR_SOME));
	put("/proc/sys/kernel/numa_balancing", 0);
	fd = pin(mem, NR_SOME * psize(), PIN_LONGTERM_TEST_FLAG_USE_WRITE);
	if (fd < 0)
		SKIP(return, "no gup_test");
	ASSERT_TRUE(resume());
	EXPECT_EQ(nr_on(mem, NR_SOME, self->from), NR_SOME);
	EXPECT_GE(event("numa_async_failed") - failed, NR_SOME * 3 / 4);
	close(fd);
	/* Whoever pins a page uses it, which is noted for several at once, with references */
	drain_lru(self->from);
	EXPECT_EQ(wrong_pages(mem, NR_SOME), 0);
	put("/proc/sys/kernel/numa_balancing", 1);
	EXPECT_TRUE(converge(mem, NR_SOME, self->to));
}

/* --- cgroups -------------------------------------------------------------------------- */

static long migrated_of(const char *name)
{
	char path[128];

	snprintf(path, sizeof(path), CGROUP "%s/memory.stat", name);
	return read_named(path, "numa_pages_migrated");
}

/* Its memory is its own until all of it has been counted. */
static bool use_memory(void *arg)
{
	struct balancing *numa = arg;
	char *mem;

	mem = memory_on(numa->node[0], numa->node[1], NR_SOME / 2, -1);
	return mem && queue(mem, NR_SOME / 2, NR_SOME / 2) && !wrong_pages(mem, NR_SOME / 2);
}

static bool use_memory_of_a(void *arg)
{
	return own_cgroup("a", "+memory") && use_memory(arg);
}

static bool use_memory_of_b(void *arg)
{
	return own_cgroup("b", "+memory") && use_memory(arg);
}

static void keep_awake(int cpu)
{
	const double end = now() + 0.05;

	run_on_cpu(cpu);
	while (now() < end)
		;
}

/* Folios of both are in the same batches, and are counted for their own. */
TEST_F_TIMEOUT(async, cgroups, 120)
{
	const double end = now() + SECONDS;
	long was, was_a, was_b, a, b, all;
	struct child child_a, child_b;

	if (access("/sys/fs/cgroup/cgroup.procs", W_OK))
		SKIP(return, "no cgroup v2 in /sys/fs/cgroup");
	no_cgroup("a");
	no_cgroup("b");
	run_on(self->to);
	ASSERT_TRUE(settle());
	put(LIMITS "batch_size", 512);
	pause_it(true);
	was = event("numa_pages_migrated");
	child_a = start_child(use_memory_of_a, NULL, &self->numa);
	ASSERT_TRUE(child_is_ready(&child_a));
	child_b = start_child(use_memory_of_b, NULL, &self->numa);
	ASSERT_TRUE(child_is_ready(&child_b));
	was_a = migrated_of("a");
	was_b = migrated_of("b");
	put("/proc/sys/kernel/numa_balancing", 0);
	ASSERT_TRUE(resume());
	all = event("numa_pages_migrated") - was;
	EXPECT_GE(all, NR_SOME * 3 / 4);
	/* memory.stat is some seconds old; older, if the CPU that looks after it sleeps */
	do {
		for (int cpu = 0; cpu < sysconf(_SC_NPROCESSORS_CONF); cpu++)
			keep_awake(cpu);
		a = migrated_of("a") - was_a;
		b = migrated_of("b") - was_b;
	} while (a + b < all - NR_SOME / 4 && now() < end);
	EXPECT_GE(a, NR_SOME / 4);
	EXPECT_GE(b, NR_SOME / 4);
	/* The parent and others have some pages, too */
	EXPECT_LE(a + b, all);
	EXPECT_GE(a + b, all - NR_SOME / 4);
	/* The second one has the first one's pipe open, too */
	EXPECT_TRUE(end_child(&child_b));
	EXPECT_TRUE(end_child(&child_a));
	no_cgroup("a");
	no_cgroup("b");
}

/* --- failures -------------------------------------------------------------------------- */

static pid_t thread_of(int node)
{
	char comm[32], path[64], found[32] = "";
	pid_t pid;

	snprintf(comm, sizeof(comm), "kmigrated%d\n", node);
	for (pid = 1; pid < 1 << 16; pid++) {
		snprintf(path, sizeof(path), "/proc/%d/comm", pid);
		if (read_file(path, found, sizeof(found)) > 0 && !strcmp(found, comm))
			return pid;
	}
	return -1;
}

/* No memory for copies: that is told to tasks, which migrate for themselves then. */
TEST_F_TIMEOUT(async, failures, 120)
{
	const size_t nr = 1024;
	const long failed = event("numa_async_failed");
	const long sync = event("numa_async_sync_failing");
	const pid_t pid = thread_of(self->to);
	char path[64];
	char *mem;

	snprintf(path, sizeof(path), "/proc/%d/make-it-fail", pid);
	if (access(path, W_OK) || access(FAULTS "probability", W_OK))
		SKIP(return, "needs CONFIG_FAIL_PAGE_ALLOC");
	put_str(FAULTS "task-filter", "Y");
	put_str(FAULTS "ignore-gfp-highmem", "N");
	put_str(FAULTS "ignore-gfp-wait", "N");
	put(FAULTS "min-order", 0);
	put(FAULTS "verbose", 0);
	put(FAULTS "times", -1);
	put(FAULTS "probability", 100);
	put(path, 1);

	mem = memory_on(self->from, self->to, nr, -1);
	EXPECT_TRUE(converge(mem, nr, self->to));
	put(path, 0);
	put(FAULTS "probability", 0);
	put_str(FAULTS "task-filter", "N");
	EXPECT_GT(event("numa_async_failed"), failed);
	EXPECT_GT(event("numa_async_sync_failing"), sync);
	ASSERT_TRUE(settle());
	EXPECT_EQ(wrong_pages(mem, nr), 0);
}

/* --- storms ------------------------------------------------------------------------------ */

struct writer {
	char *mem;
	size_t nr;
	int node, id;
	bool *stop;
	uint64_t rounds;
	bool wrong;
};

/* Pages that are the same become one, and are no longer when they are written to. */
static void merging(char *mem, size_t nr, int *node)
{
	static char *same;
	const double end = now() + 0.05;

	if (!same) {
		same = memory_on(node[0], node[1], NR_SOME, -1);
		madvise(same, NR_SOME * psize(), MADV_MERGEABLE);
		put(KSM "pages_to_scan", 10000);
		put(KSM "sleep_millisecs", 1);
		put(KSM "run", 1);
	}
	for (size_t page = 0; page < NR_SOME; page++)
		memset(same + page * psize(), 1, psize());
	while (now() < end)
		touch(same, NR_SOME);
}

/* Each has a word of its own in each page, which counts. */
static void *write_words(void *arg)
{
	struct writer *w = arg;

	run_on(w->node);
	while (!__atomic_load_n(w->stop, __ATOMIC_RELAXED)) {
		for (size_t page = 0; page < w->nr; page++) {
			uint64_t *word = (uint64_t *)(w->mem + page * psize()) + w->id;

			w->wrong |= __atomic_load_n(word, __ATOMIC_RELAXED) != w->rounds;
			__atomic_store_n(word, w->rounds + 1, __ATOMIC_RELAXED);
		}
		w->rounds++;
	}
	return NULL;
}

FIXTURE(storm) {
	struct balancing numa;
	int from, to;
	char *mem;
	bool stop;
	struct writer writers[4];
	pthread_t threads[4];
};

FIXTURE_VARIANT(storm) {
	/* Called again and again */
	void (*meddle)(char *mem, size_t nr, int *node);
};

#define NR_STORM 1024

static void no_meddling(char *mem, size_t nr, int *node)
{
	poll(NULL, 0, 20);
}

static void switching(char *mem, size_t nr, int *node)
{
	put(SWITCH, 0);
	put(SWITCH, 1);
	poll(NULL, 0, 20);
}

static size_t misplaced;

static void binding(char *mem, size_t nr, int *node)
{
	static int n;
	const int to = node[n++ & 1];

	/* Without an error, they are there; and stay there */
	if (!mbind_node(mem, nr * psize(), to, MPOL_MF_MOVE | MPOL_MF_STRICT)) {
		misplaced += nr - nr_on(mem, nr, to);
		poll(NULL, 0, 5);
		misplaced += nr - nr_on(mem, nr, to);
	}
	syscall(__NR_mbind, mem, nr * psize(), MPOL_DEFAULT, NULL, 0, 0);
	poll(NULL, 0, 20);
}

static void unplugging_cpus(char *mem, size_t nr, int *node)
{
	char path[64];

	/* The second one of a node that has no more than that keeps the node's writers */
	snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/online", cpu_of(node[1]) + 1);
	if (!put(path, 0))
		ksft_exit_fail_msg("cannot write to %s\n", path);
	poll(NULL, 0, 10);
	put(path, 1);
	poll(NULL, 0, 10);
}

static void limits(char *mem, size_t nr, int *node)
{
	static unsigned int n;
	static const int sizes[] = { 1, 2, 64, 512, 16, 256 };

	put(LIMITS "batch_size", sizes[n++ % 6]);
	put(LIMITS "ring_size", sizes[n % 3]);
	put(LIMITS "smallest_batch", sizes[n % 2]);
	poll(NULL, 0, 20);
}

static void everything(char *mem, size_t nr, int *node)
{
	static void (* const some[])(char *mem, size_t nr, int *node) = {
		switching, binding, unplugging_cpus, limits,
	};
	static unsigned int n;

	some[n++ % ARRAY_SIZE(some)](mem, nr, node);
}

FIXTURE_VARIANT_ADD(storm, alone) { .meddle = no_meddling };
FIXTURE_VARIANT_ADD(storm, switches) { .meddle = switching };
FIXTURE_VARIANT_ADD(storm, mbind) { .meddle = binding };
FIXTURE_VARIANT_ADD(storm, limits) { .meddle = limits };
FIXTURE_VARIANT_ADD(storm, cpus) { .meddle = unplugging_cpus };
FIXTURE_VARIANT_ADD(storm, ksm) { .meddle = merging };
FIXTURE_VARIANT_ADD(storm, everything) { .meddle = everything };

FIXTURE_SETUP(storm)
{
	const char *why = start(&self->numa, false);

	if (!why && variant->meddle == merging && access(KSM "run", W_OK)) {
		stop(&self->numa);
		why = "needs CONFIG_KSM";
	}
	if (why)
		SKIP(return, "%s", why);
	self->from = self->numa.node[0];
	self->to = self->numa.node[1];
	self->mem = memory_on(self->from, self->to, NR_STORM, -1);
	memset(self->mem, 0, NR_STORM * psize());
}

FIXTURE_TEARDOWN(storm)
{
	EXPECT_TRUE(stop(&self->numa));
}

/* Writers go to and fro, and their memory with them: no word is lost. */
TEST_F_TIMEOUT(storm, loses_nothing, 120)
{
	const double end = now() + 4;

	for (int i = 0; i < 4; i++) {
		self->writers[i] = (struct writer) {
			.mem = self->mem,
			.nr = NR_STORM,
			.node = self->numa.node[i % 2],
			.id = i,
			.stop = &self->stop,
		};
		ASSERT_EQ(pthread_create(&self->threads[i], NULL, write_words,
					 &self->writers[i]), 0);
	}
	while (now() < end)
		variant->meddle(self->mem, NR_STORM, self->numa.node);
	EXPECT_EQ(misplaced, 0);
	if (variant->meddle == merging) {
		EXPECT_GT(get(KSM "full_scans"), 0);
		put(KSM "run", 2);
		put(KSM "run", 0);
	}
	__atomic_store_n(&self->stop, true, __ATOMIC_RELAXED);
	for (int i = 0; i < 4; i++) {
		pthread_join(self->threads[i], NULL);
		EXPECT_FALSE(self->writers[i].wrong);
		EXPECT_GT(self->writers[i].rounds, 0);
	}
}

TEST_HARNESS_MAIN
