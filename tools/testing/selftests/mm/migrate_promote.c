// SPDX-License-Identifier: GPL-2.0
/*
 * Promotion in the background: NUMA balancing for memory tiers
 * (kernel.numa_balancing = 2) with kernel.numa_balancing_async.
 *
 * Needs a node with CPUs, and one without, of a slower memory tier.
 */
#define _GNU_SOURCE
#include "numa_async.h"
#include "kselftest_harness.h"

#define LIMIT		"/proc/sys/kernel/numa_balancing_promote_rate_limit_MBps"
#define NR_PAGES	2048

FIXTURE(promote) {
	struct balancing numa;
	int fast, slow;
	long limit;
	char *mem;
};

static const char *set_up(struct balancing *numa, int *fast, int *slow)
{
	const char *why = start_on(numa, false, false);

	if (why)
		return why;
	*fast = cpu_of(numa->node[0]) < 0;
	*slow = numa->node[!*fast];
	*fast = numa->node[*fast];
	if (cpu_of(*fast) < 0 || cpu_of(*slow) >= 0)
		return "needs a node without CPUs, of a slower tier";
	if (!put("/proc/sys/kernel/numa_balancing", 2))
		return "no NUMA_BALANCING_MEMORY_TIERING";
	return NULL;
}

/* Memory of the slow tier, without a policy. */
static char *slow_memory(int node)
{
	unsigned long mask = 1UL << node;
	char *mem;

	if (syscall(__NR_set_mempolicy, MPOL_BIND, &mask, 8 * sizeof(mask)))
		return NULL;
	mem = mmap(NULL, NR_PAGES * psize(), PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(mem, NR_PAGES * psize(), MADV_NOHUGEPAGE);
	fill(mem, NR_PAGES);
	syscall(__NR_set_mempolicy, MPOL_DEFAULT, NULL, 0);
	return nr_on(mem, NR_PAGES, node) == NR_PAGES ? mem : NULL;
}

FIXTURE_SETUP(promote)
{
	const char *why;

	self->limit = get(LIMIT);
	why = set_up(&self->numa, &self->fast, &self->slow);
	if (why) {
		stop(&self->numa);
		SKIP(return, "%s", why);
	}
	self->mem = slow_memory(self->slow);
	ASSERT_NE(self->mem, NULL);
}

FIXTURE_TEARDOWN(promote)
{
	if (self->limit > 0)
		put(LIMIT, self->limit);
	EXPECT_TRUE(stop(&self->numa));
}

/* Hot pages get to the fast tier, and are counted once. */
TEST_F_TIMEOUT(promote, hot_pages, 120)
{
	const long promoted = event("pgpromote_success");
	const long migrated = event("numa_pages_migrated");
	const long async = event("numa_async_migrated");

	EXPECT_TRUE(converge(self->mem, NR_PAGES, self->fast));
	ASSERT_TRUE(settle());
	EXPECT_EQ(wrong_pages(self->mem, NR_PAGES), 0);
	EXPECT_GT(event("numa_async_migrated"), async);
	put("/proc/sys/vm/stat_refresh", 1);
	EXPECT_GE(event("pgpromote_success") - promoted, NR_PAGES * 95 / 100);
	/* Nothing else migrates for NUMA balancing here */
	EXPECT_EQ(event("pgpromote_success") - promoted,
		  event("numa_pages_migrated") - migrated);
}

static long mem_free_kb(int node)
{
	char path[64], line[128];
	long kb = -1;
	FILE *file;

	snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/meminfo", node);
	file = fopen(path, "r");
	while (file && kb < 0 && fgets(line, sizeof(line), file))
		if (sscanf(line, "Node %*d MemFree: %ld", &kb) != 1)
			kb = -1;
	if (file)
		fclose(file);
	return kb;
}

/* No faster than asked for, although those who queue do not wait. */
TEST_F_TIMEOUT(promote, rate_limit, 120)
{
	const long promoted = event("pgpromote_success");
	const double begun = now();
	long pages, most;

	/* There is no limit while there is more than 1 GB left */
	if (mem_free_kb(self->fast) > 1 << 20)
		SKIP(return, "node %d has more than 1 GB free", self->fast);
	if (!put(LIMIT, 1))
		SKIP(return, "no rate limit");
	while (now() < begun + 4)
		touch(self->mem, NR_PAGES);
	put("/proc/sys/kernel/numa_balancing", 0);
	ASSERT_TRUE(settle());
	put("/proc/sys/vm/stat_refresh", 1);
	pages = event("pgpromote_success") - promoted;
	/* One MB for each second that has begun */
	most = (long)(now() - begun + 2) * (1 << 20) / psize();
	EXPECT_GT(pages, 0);
	EXPECT_LE(pages, most);
	EXPECT_EQ(wrong_pages(self->mem, NR_PAGES), 0);
}

TEST_HARNESS_MAIN
