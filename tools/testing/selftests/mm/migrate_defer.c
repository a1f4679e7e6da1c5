// SPDX-License-Identifier: GPL-2.0
/*
 * TLB flushes that are put off while memory that is only read is migrated.
 *
 * What could go wrong is that a CPU reads a page where it no longer is, after
 * somebody has changed it where it is now. So a thread reads it all the time, on
 * a CPU of its own that has no reason to flush its TLB, while others migrate it
 * and change it in all the ways there are. Each page has a value that only grows;
 * who has changed it says so in memory that is not migrated, and whoever has read
 * that must not find an older value any more.
 *
 * That the reader really reads what is out of date is seen by held.until_drained:
 * there the kernel overwrites what it holds. Without that test passing, the others
 * prove nothing.
 *
 * Mutants of the kernel that are caught here:
 *   held.until_drained		a drain that does not flush, or not all CPUs
 *   held.deadline		no timer
 *   held.cap			no cap
 *   held.poison		no drain for who wants particular pages
 *   litmus.*			migration does not look for a writer again, or not at
 *				the flag (next_writer); a writer does not drain, or clears
 *				the flag first (two_writers); a CPU passes for synced
 *				that read the epoch too late (flushed_by_others); who
 *				unmaps does not flush what is pending (unmapping)
 *
 * MIGRATE_TEST_DIR says where files are made (.): it should be an ext4.
 * MIGRATE_DEFER_ROUNDS is how often something is changed in the litmus tests.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <linux/perf_event.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include "migrate_util.h"
#include "kselftest_harness.h"

#define SWITCHES	"/sys/kernel/mm/migrate_defer/"
#define DEBUG		"/sys/kernel/debug/migrate_defer/"
#define NR_PAGES	64
#define NR_LITMUS	8		/* all are moved at once, so each change meets a move */
#define NR_WORDS	(4096 / sizeof(uint64_t))
#define OVERWRITTEN	0x5a		/* each byte: not the number of any page */
#define UPROBES		"/sys/bus/event_source/devices/uprobe/type"
#define ROUNDS		1000
#define TIMEOUT		600
#ifndef MADV_SOFT_OFFLINE
#define MADV_SOFT_OFFLINE	101
#endif

static long counter(const char *name)
{
	return read_named("/proc/vmstat", name);
}

/*
 * How much is held. It is kept for each CPU apart, and added up now and then, or if
 * that is asked for. Not while somebody is to read what is stale: all CPUs run a
 * kernel thread then, and catch up with flushes when they come back.
 */
static long held(void)
{
	write_num("/proc/sys/vm/stat_refresh", 1);
	return counter("nr_migrate_deferred");
}

static long held_of(int node)
{
	char path[64];

	write_num("/proc/sys/vm/stat_refresh", 1);
	snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/vmstat", node);
	return read_named(path, "nr_migrate_deferred");
}

static bool put(const char *dir, const char *name, long value)
{
	char path[256], buf[32];
	const int len = snprintf(buf, sizeof(buf), "%ld", value);
	int fd, ret;

	snprintf(path, sizeof(path), "%s%s", dir, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ret = write(fd, buf, len);
	close(fd);
	return ret == len;
}

static void run_on(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);
}

/* A file on an ext4, whose pages are in the page cache, clean, on the first node. */
struct file {
	char path[256];
	int node[2];
	int at;
	size_t nr;
	uint64_t *mem;			/* read-only, shared */
	void **pages;
	int *nodes, *status;
};

/*
 * The first word of page @i after change @n: says which page it is, and grows. So it
 * does while the kernel writes it byte by byte, as the high bytes of @n come first.
 */
static uint64_t version(size_t i, uint64_t n)
{
	return __builtin_bswap64(n) | i;
}

static uint64_t change_of(uint64_t version)
{
	return __builtin_bswap64(version & ~0xffULL);
}

/* All others stay what they are. The first of these is code that returns @i. */
static uint64_t pattern(size_t i, size_t word)
{
	if (word == 1)
		return 0xc3ULL << 40 | (uint64_t)i << 8 | 0xb8;
	return (i << 16 | word) * 0x9e3779b97f4a7c15ULL;
}

static bool write_page(int fd, size_t i, uint64_t n)
{
	uint64_t page[NR_WORDS] = { version(i, n) };

	for (size_t word = 1; word < NR_WORDS; word++)
		page[word] = pattern(i, word);
	return pwrite(fd, page, sizeof(page), i * sizeof(page)) == sizeof(page);
}

static bool write_pages(struct file *f)
{
	const int fd = open(f->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	bool good = fd >= 0;

	for (size_t i = 0; good && i < f->nr; i++)
		good = write_page(fd, i, 1);
	good = good && !fsync(fd);
	close(fd);
	return good;
}

/* Words that are not what they should be, apart from the first one of each page. */
static size_t wrong_words(struct file *f)
{
	const int fd = open(f->path, O_RDONLY | O_CLOEXEC);
	uint64_t page[NR_WORDS];
	size_t wrong = 0;

	for (size_t i = 0; i < f->nr; i++) {
		if (pread(fd, page, sizeof(page), i * sizeof(page)) != sizeof(page))
			wrong++;
		for (size_t word = 1; word < NR_WORDS; word++)
			wrong += page[word] != pattern(i, word);
	}
	close(fd);
	return wrong;
}

static void prefer(int node)
{
	unsigned long mask = node < 0 ? 0 : 1UL << node;

	syscall(__NR_set_mempolicy, node < 0 ? MPOL_DEFAULT : MPOL_BIND, &mask, 64);
}

static uint64_t *map_pages(struct file *f, int prot, int flags)
{
	const int fd = open(f->path, O_RDONLY | O_CLOEXEC);
	uint64_t *mem = mmap(NULL, f->nr * psize(), prot, flags, fd, 0);

	close(fd);
	return mem;
}

static const char *make_file(struct file *f, size_t nr, int flags)
{
	struct statfs fs;

	memset(f, 0, sizeof(*f));
	f->nr = nr;
	snprintf(f->path, sizeof(f->path), "%s/migrate_defer_%d", test_dir(), getpid());
	if (!two_nodes(f->node))
		return "needs two nodes with memory";
	if (statfs(test_dir(), &fs) || fs.f_type != EXT4_SUPER_MAGIC)
		return "needs an ext4, see MIGRATE_TEST_DIR";
	prefer(f->node[0]);
	if (!write_pages(f))
		return "no file";
	prefer(-1);
	f->mem = map_pages(f, PROT_READ, flags);
	f->pages = calloc(nr, sizeof(*f->pages));
	f->nodes = calloc(nr, sizeof(*f->nodes));
	f->status = calloc(nr, sizeof(*f->status));
	for (size_t i = 0; i < nr; i++)
		f->pages[i] = (char *)f->mem + i * psize();
	return NULL;
}

static void remove_file(struct file *f)
{
	unlink(f->path);
	free(f->pages);
	free(f->nodes);
	free(f->status);
}

/* Moves @nr pages from the @first to the other node. Returns how many are there. */
static size_t move(struct file *f, size_t first, size_t nr, int to)
{
	size_t there = 0;

	for (size_t i = first; i < first + nr; i++)
		f->nodes[i] = f->node[to];
	if (syscall(__NR_move_pages, 0, nr, f->pages + first, f->nodes + first,
		    f->status + first, MPOL_MF_MOVE) < 0)
		return 0;
	for (size_t i = first; i < first + nr; i++)
		there += f->status[i] == f->node[to];
	return there;
}

static const char *switch_on(void)
{
	if (access(SWITCHES, F_OK))
		return "no CONFIG_MIGRATION_DEFER_FLUSH";
	if (sysconf(_SC_NPROCESSORS_ONLN) < 3)
		return "needs three CPUs";
	if (!put(SWITCHES, "enabled", 1))
		return errno == EOPNOTSUPP ? "this CPU needs no IPI to flush" :
					     "cannot be switched on";
	return NULL;
}

static bool have_debug(void)
{
	return !access(DEBUG "overwrite", W_OK);
}

static void switch_off(void)
{
	if (have_debug()) {
		put(DEBUG, "overwrite", 0);
		put(DEBUG, "cap_pages", 0);
		put(DEBUG, "deadline_ms", 0);
		put(DEBUG, "delay_us", 0);
	}
	put(SWITCHES, "enabled", 0);
}

/* --- A reader ---------------------------------------------------------------- */

/*
 * The version that a page must have at least, unless that is taken back: who changes
 * it says so.
 */
static atomic_ullong at_least[NR_PAGES];

struct reader {
	pthread_t thread;
	struct file *f;
	int cpu;
	atomic_bool stop;
	atomic_ulong rounds;
	atomic_ulong overwritten;	/* pages found like that */
	atomic_ulong old;		/* pages older than they must be */
	atomic_ulong wrong;		/* pages that are another one */
	void (*also)(struct reader *r, size_t i);	/* what else is done with each */
};

static __thread sigjmp_buf on_fault;

static void fault(int sig)
{
	siglongjmp(on_fault, 1);
}

/* The page cache may have been truncated, or not be mapped. */
static uint64_t read_word(uint64_t *word, uint64_t otherwise)
{
	if (sigsetjmp(on_fault, 0))
		return otherwise;
	return __atomic_load_n(word, __ATOMIC_RELAXED);
}

/* How often that has been: a reader in between cannot judge what it has read. */
static atomic_ulong taken_back;

/* Before the page has that version. */
static void take_back(size_t i, uint64_t least)
{
	atomic_store(&at_least[i], least);
	atomic_fetch_add(&taken_back, 1);
}

static void read_page(struct reader *r, size_t i)
{
	const unsigned long before = atomic_load(&taken_back);
	const uint64_t least = atomic_load(&at_least[i]);
	const uint64_t value = read_word(r->f->mem + i * NR_WORDS, ~0ULL);

	/* The kernel may be at it, and writes bytes in order */
	if ((value & 0xff) == OVERWRITTEN)
		atomic_fetch_add(&r->overwritten, 1);
	else if (change_of(value) < least && atomic_load(&taken_back) == before)
		atomic_fetch_add(&r->old, 1);
	else if (value && value != ~0ULL && (value & 0xff) != i)
		atomic_fetch_add(&r->wrong, 1);
}

static void *read_pages(void *arg)
{
	struct reader *r = arg;
	size_t i;

	run_on(r->cpu);
	while (!atomic_load(&r->stop)) {
		for (i = 0; i < r->f->nr; i++) {
			read_page(r, i);
			if (r->also)
				r->also(r, i);
		}
		atomic_fetch_add(&r->rounds, 1);
	}
	return NULL;
}

static void start_reader(struct reader *r, struct file *f, int cpu)
{
	struct sigaction act = { .sa_handler = fault, .sa_flags = SA_NODEFER };

	sigaction(SIGBUS, &act, NULL);
	sigaction(SIGSEGV, &act, NULL);
	memset(r, 0, sizeof(*r));
	r->f = f;
	r->cpu = cpu;
	for (size_t i = 0; i < f->nr; i++)
		atomic_store(&at_least[i], 1);
	pthread_create(&r->thread, NULL, read_pages, r);
}

/* Until all pages have been read twice: the first round may have begun before. */
static void wait_for_reader(struct reader *r)
{
	const unsigned long rounds = atomic_load(&r->rounds);

	while (atomic_load(&r->rounds) < rounds + 2)
		sched_yield();
}

static void stop_reader(struct reader *r)
{
	atomic_store(&r->stop, true);
	pthread_join(r->thread, NULL);
}

/* --- What is seen before a drain, and what after it --------------------------- */

FIXTURE(held) {
	struct file f;
	struct reader r;
};

FIXTURE_SETUP(held)
{
	const char *why = switch_on();

	if (!why && !have_debug())
		why = "no CONFIG_MIGRATION_DEFER_DEBUG";
	if (!why)
		why = make_file(&self->f, NR_PAGES, MAP_SHARED);
	if (why)
		SKIP(return, "%s", why);
	run_on(0);
	start_reader(&self->r, &self->f, 1);
	wait_for_reader(&self->r);
}

FIXTURE_TEARDOWN(held)
{
	if (self->r.thread)
		stop_reader(&self->r);
	switch_off();
	EXPECT_EQ(atomic_load(&self->r.wrong), 0);
	remove_file(&self->f);
}

/* Migrates all pages, and has their sources held until somebody wants them. */
static bool hold_all(struct file *f)
{
	const long before = counter("migrate_defer_pages");

	put(DEBUG, "cap_pages", 4096);
	put(DEBUG, "deadline_ms", 600000);
	return move(f, 0, f->nr, 1) == f->nr &&
	       counter("migrate_defer_pages") - before == (long)f->nr;
}

/* Until the reader has seen it: its CPU may have flushed meanwhile, for other reasons. */
static bool hold_until_seen(struct file *f, struct reader *r)
{
	put(DEBUG, "overwrite", 1);
	for (int tries = 0; tries < 20; tries++) {
		if (!hold_all(f))
			return false;
		wait_for_reader(r);
		if (atomic_load(&r->overwritten))
			return true;
		put(SWITCHES, "enabled", 0);
		if (move(f, 0, f->nr, 0) != f->nr)
			return false;
		put(SWITCHES, "enabled", 1);
	}
	return false;
}

/* Looks how often what is held has been read, until that is no longer possible. */
static bool still_overwritten(struct reader *r)
{
	unsigned long seen;

	/* The reader may be in the middle of a page */
	wait_for_reader(r);
	seen = atomic_load(&r->overwritten);
	wait_for_reader(r);
	return atomic_load(&r->overwritten) != seen;
}

/* The positive control. Mutant: a drain that does not flush. */
TEST_F_TIMEOUT(held, until_drained, TIMEOUT)
{
	int fd;

	ASSERT_TRUE(hold_until_seen(&self->f, &self->r));

	fd = open(self->f.path, O_RDWR | O_CLOEXEC);
	EXPECT_FALSE(still_overwritten(&self->r));
	TH_LOG("%lu times what is held was read through an old translation",
	       atomic_load(&self->r.overwritten));
	EXPECT_EQ(held(), 0);
	close(fd);
}

/* Whoever unmaps, or changes protection, sees to it that nothing is stale. */
TEST_F_TIMEOUT(held, until_unmapped, TIMEOUT)
{
	const size_t len = NR_PAGES / 4 * psize();
	char *mem = (char *)self->f.mem;

	ASSERT_TRUE(hold_until_seen(&self->f, &self->r));
	ASSERT_EQ(madvise(mem, len, MADV_DONTNEED), 0);
	ASSERT_EQ(mprotect(mem + len, len, PROT_NONE), 0);
	ASSERT_NE(mremap(mem + 2 * len, len, len, MREMAP_MAYMOVE | MREMAP_DONTUNMAP),
		  MAP_FAILED);
	ASSERT_EQ(munmap(mem + 3 * len, len), 0);
	EXPECT_FALSE(still_overwritten(&self->r));
	EXPECT_EQ(held(), NR_PAGES);
}

/* Off means off: nothing is held any more when it has been switched off. */
TEST_F_TIMEOUT(held, until_switched_off, TIMEOUT)
{
	long before, pages;

	ASSERT_TRUE(hold_until_seen(&self->f, &self->r));
	before = counter("migrate_defer_drain_off");
	ASSERT_TRUE(put(SWITCHES, "enabled", 0));
	EXPECT_EQ(counter("migrate_defer_drain_off") - before, 1);
	EXPECT_EQ(held(), 0);
	pages = counter("migrate_defer_pages");
	EXPECT_EQ(move(&self->f, 0, NR_PAGES, 0), NR_PAGES);
	EXPECT_FALSE(still_overwritten(&self->r));
	EXPECT_EQ(counter("migrate_defer_pages"), pages);
}

/* --- Bounds -------------------------------------------------------------------- */

/* Mutant: no timer. */
TEST_F_TIMEOUT(held, deadline, 60)
{
	const long before = counter("migrate_defer_drain_timer");
	const time_t end = time(NULL) + 30;

	put(DEBUG, "cap_pages", 4096);
	put(DEBUG, "deadline_ms", 100);
	ASSERT_EQ(move(&self->f, 0, NR_PAGES, 1), NR_PAGES);
	while (held() && time(NULL) < end)
		sched_yield();
	EXPECT_EQ(held(), 0);
	EXPECT_GE(counter("migrate_defer_drain_timer") - before, 1);
}

/* The amount is never above the cap. */
TEST_F_TIMEOUT(held, cap, 60)
{
	const long drains = counter("migrate_defer_drain_cap");
	const long denied = counter("migrate_defer_denied_cap");

	put(DEBUG, "cap_pages", 8);
	put(DEBUG, "deadline_ms", 600000);
	for (int i = 0; i < NR_PAGES; i += 8) {
		ASSERT_EQ(move(&self->f, i, 8, 1), 8);
		EXPECT_EQ(held(), 8);
	}
	EXPECT_EQ(counter("migrate_defer_drain_cap") - drains, NR_PAGES / 8 - 1);
	/* What does not fit at all is flushed as usual */
	ASSERT_EQ(move(&self->f, 0, 9, 0), 9);
	EXPECT_EQ(counter("migrate_defer_denied_cap") - denied, 9);
	/* One page at a time is an edge, too */
	put(DEBUG, "cap_pages", 1);
	for (int i = 9; i < 16; i++) {
		ASSERT_EQ(move(&self->f, i, 1, 0), 1);
		EXPECT_EQ(held_of(self->f.node[1]), 1);
	}
}

/* A cap of nothing: all is as if it were switched off. */
TEST_F_TIMEOUT(held, max_kb, 60)
{
	const long before = counter("migrate_defer_pages");

	ASSERT_TRUE(put(SWITCHES, "max_kb", 0));
	EXPECT_EQ(read_num(SWITCHES "node0/cap_kb"), 0);
	ASSERT_EQ(move(&self->f, 0, NR_PAGES, 1), NR_PAGES);
	EXPECT_EQ(counter("migrate_defer_pages"), before);
	put(SWITCHES, "max_kb", 8192);
	EXPECT_LE(read_num(SWITCHES "node0/cap_kb"), 8192);
}

static bool put_str(const char *path, const char *value)
{
	const int fd = open(path, O_WRONLY | O_CLOEXEC);
	const bool good = fd >= 0 && write(fd, value, strlen(value)) > 0;

	close(fd);
	return good;
}

/* Who wants particular pages, or a CPU, gets what is held first. */
TEST_F_TIMEOUT(held, cpu_offline, 60)
{
	const long before = counter("migrate_defer_drain_cpu");
	const char *online = "/sys/devices/system/cpu/cpu2/online";

	if (access(online, W_OK))
		SKIP(return, "CPU 2 cannot go offline");
	ASSERT_TRUE(hold_all(&self->f));
	ASSERT_TRUE(put_str(online, "0"));
	EXPECT_EQ(held(), 0);
	EXPECT_EQ(counter("migrate_defer_drain_cpu") - before, 1);
	ASSERT_TRUE(put_str(online, "1"));
}

TEST_F_TIMEOUT(held, poison, 60)
{
	const long before = counter("migrate_defer_drain_poison");
	const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	unsigned long pfn;
	char *other = mmap(NULL, psize(), PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	*other = 1;
	pfn = pagemap_get_pfn(fd, other);
	close(fd);
	ASSERT_TRUE(hold_all(&self->f));
	if (madvise(other, psize(), MADV_SOFT_OFFLINE))
		SKIP(return, "no MADV_SOFT_OFFLINE");
	EXPECT_EQ(held(), 0);
	EXPECT_EQ(counter("migrate_defer_drain_poison") - before, 1);
	/* Its block of memory could not go online again */
	put("/sys/kernel/debug/hwpoison/", "unpoison-pfn", pfn);
}

/* A block of memory goes offline, of the node whose memory is held. */
static bool take_offline(int node, char *state, size_t len)
{
	char path[128];
	struct stat st;

	for (int block = 0; block < 1024; block++) {
		snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/memory%d",
			 node, block);
		if (stat(path, &st))
			continue;
		snprintf(state, len, "/sys/devices/system/memory/memory%d/state", block);
		if (put_str(state, "offline"))
			return true;
	}
	return false;
}

TEST_F_TIMEOUT(held, memory_offline, TIMEOUT)
{
	const long before = counter("migrate_defer_drain_isolate");
	char state[128];

	ASSERT_TRUE(hold_all(&self->f));
	if (!take_offline(self->f.node[0], state, sizeof(state)))
		SKIP(return, "no memory can go offline");
	EXPECT_EQ(held(), 0);
	EXPECT_EQ(counter("migrate_defer_drain_isolate") - before, 1);
	ASSERT_TRUE(put_str(state, "online"));
}

/* Somebody needs more memory of the node than there is without reclaim. */
TEST_F_TIMEOUT(held, pressure, TIMEOUT)
{
	const long kswapd = counter("migrate_defer_drain_kswapd");
	const long alloc = counter("migrate_defer_drain_alloc");
	const size_t chunk = 4 << 20;
	pid_t pid;
	int status;

	ASSERT_TRUE(hold_all(&self->f));
	pid = fork();
	if (!pid) {
		prefer(self->f.node[0]);
		while (counter("migrate_defer_drain_kswapd") == kswapd &&
		       counter("migrate_defer_drain_alloc") == alloc)
			memset(mmap(NULL, chunk, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 1, chunk);
		_exit(0);
	}
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	EXPECT_EQ(status, 0);
	EXPECT_EQ(held(), 0);
}

/* --- What is not deferred -------------------------------------------------------- */

TEST_F_TIMEOUT(held, open_for_writing, 60)
{
	const long before = counter("migrate_defer_pages");
	const long denied = counter("migrate_defer_denied_writer");
	const int fd = open(self->f.path, O_RDWR | O_CLOEXEC);

	ASSERT_EQ(move(&self->f, 0, NR_PAGES, 1), NR_PAGES);
	EXPECT_EQ(counter("migrate_defer_pages"), before);
	EXPECT_EQ(counter("migrate_defer_denied_writer") - denied, NR_PAGES);
	close(fd);
}

/* Who binds memory to a node is one of those who defer. */
TEST_F_TIMEOUT(held, by_mbind, 60)
{
	const unsigned long mask = 1UL << self->f.node[1];
	const long before = counter("migrate_defer_pages");

	put(DEBUG, "cap_pages", 4096);
	put(DEBUG, "deadline_ms", 600000);
	ASSERT_EQ(syscall(__NR_mbind, self->f.mem, NR_PAGES * psize(), MPOL_BIND, &mask,
			  8 * sizeof(mask), MPOL_MF_MOVE | MPOL_MF_STRICT), 0);
	EXPECT_EQ(counter("migrate_defer_pages") - before, NR_PAGES);
	EXPECT_EQ(held(), NR_PAGES);
}

/* A filesystem that has not said so may change pages whenever it likes. Mutant 133. */
TEST_F_TIMEOUT(held, other_filesystem, 60)
{
	const int fd = memfd_create("migrate_defer", 0);
	const long before = counter("migrate_defer_pages");
	const long denied = counter("migrate_defer_denied_fs");
	struct file *f = &self->f;
	char *mem;

	for (size_t i = 0; i < f->nr; i++)
		ASSERT_TRUE(write_page(fd, i, 1));
	mem = mmap(NULL, f->nr * psize(), PROT_READ, MAP_PRIVATE, fd, 0);
	ASSERT_NE(mem, MAP_FAILED);
	close(fd);
	for (size_t i = 0; i < f->nr; i++) {
		f->pages[i] = mem + i * psize();
		FORCE_READ(mem[i * psize()]);
	}
	/* Wherever they are */
	move(f, 0, f->nr, 0);
	EXPECT_EQ(move(f, 0, f->nr, 1), f->nr);
	EXPECT_EQ(counter("migrate_defer_pages"), before);
	EXPECT_GE(counter("migrate_defer_denied_fs") - denied, (long)f->nr);
}

TEST_F_TIMEOUT(held, anonymous, 60)
{
	const long denied = counter("migrate_defer_denied_anon_dirty") +
			    counter("migrate_defer_denied_anon");
	char *mem = mmap(NULL, NR_PAGES * psize(), PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct file f = self->f;

	prefer(f.node[0]);
	for (int i = 0; i < NR_PAGES; i++) {
		f.pages[i] = mem + i * psize();
		*(uint64_t *)f.pages[i] = version(i, 1);
	}
	prefer(-1);
	/* So that there is somebody else to be flushed */
	self->r.f = &f;
	f.mem = (void *)mem;
	wait_for_reader(&self->r);
	ASSERT_EQ(move(&f, 0, NR_PAGES, 1), NR_PAGES);
	EXPECT_EQ(counter("migrate_defer_denied_anon_dirty") +
		  counter("migrate_defer_denied_anon") - denied, NR_PAGES);
	stop_reader(&self->r);
	self->r.thread = 0;
}

/* --- Changes while it is migrated -------------------------------------------------- */

struct litmus {
	struct file *f;
	struct reader *r;
	size_t call;		/* pages moved at once */
	pthread_barrier_t both;	/* writers */
	uint64_t nr, value;		/* of the change, and what page @i has then */
	atomic_bool stop;
	atomic_ulong moves;
};

static void *move_all_the_time(void *arg)
{
	struct litmus *l = arg;
	int to = 1;

	run_on(0);
	while (!atomic_load(&l->stop)) {
		for (size_t i = 0; i < l->f->nr; i += l->call)
			move(l->f, i, l->call, to);
		to = !to;
		atomic_fetch_add(&l->moves, 1);
	}
	return NULL;
}

/* Each writes @value to page @i in its own way, and leaves no writer behind. */
static bool by_pwrite(struct litmus *l, size_t i)
{
	const int fd = open(l->f->path, O_RDWR | O_CLOEXEC);
	const bool good = pwrite(fd, &l->value, 8, i * psize()) == 8;

	close(fd);
	return good;
}

/* One who opens the file and closes it, and soon the next one, who changes all of it. */
static bool by_next_writer(struct litmus *l, size_t i)
{
	bool good = true;
	uint64_t value;
	int fd;

	close(open(l->f->path, O_RDWR | O_CLOEXEC));
	usleep(random() % 400);
	fd = open(l->f->path, O_RDWR | O_CLOEXEC);
	for (size_t k = 0; k < l->f->nr; k++) {
		value = version(k, l->nr);
		good = good && pwrite(fd, &value, 8, k * psize()) == 8;
	}
	close(fd);
	return good;
}

static bool by_store(struct litmus *l, size_t i)
{
	const int fd = open(l->f->path, O_RDWR | O_CLOEXEC);
	uint64_t *mem = mmap(NULL, psize(), PROT_READ | PROT_WRITE,
				      MAP_SHARED, fd, i * psize());

	close(fd);
	if (mem == MAP_FAILED)
		return false;
	__atomic_store_n(mem, l->value, __ATOMIC_RELAXED);
	munmap(mem, psize());
	return true;
}

static bool by_truncation(struct litmus *l, size_t i)
{
	struct stat st;
	int fd;

	if (truncate(l->f->path, 0))
		return false;
	fd = open(l->f->path, O_RDWR | O_CLOEXEC);
	/* All pages are gone, so all are written again */
	for (size_t k = 0; k < l->f->nr; k++)
		if (!write_page(fd, k, l->nr))
			return false;
	if (fstat(fd, &st))
		return false;
	close(fd);
	return (size_t)st.st_size == l->f->nr * psize();
}

static bool by_punching(struct litmus *l, size_t i)
{
	const int fd = open(l->f->path, O_RDWR | O_CLOEXEC);
	bool good;

	/* It is zero for a moment */
	take_back(i, 0);
	good = !fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			  i * psize(), psize()) && write_page(fd, i, l->nr);
	close(fd);
	return good;
}

/* Out of the page cache, so that it is read from the disk again. */
static bool by_reclaim(struct litmus *l, size_t i)
{
	return !madvise(l->f->mem + i * NR_WORDS, psize(), MADV_PAGEOUT) &&
	       by_pwrite(l, i);
}

/* By the kernel, from another file. */
static bool by_copying(struct litmus *l, size_t i)
{
	const int from = open(test_dir(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	const int fd = open(l->f->path, O_RDWR | O_CLOEXEC);
	loff_t at = 0, to = i * psize();
	bool good;

	good = pwrite(from, &l->value, 8, 0) == 8 &&
	       copy_file_range(from, &at, fd, &to, 8, 0) == 8;
	close(fd);
	close(from);
	return good;
}

static bool exits_well(pid_t pid)
{
	int status;

	return waitpid(pid, &status, 0) == pid && !status;
}

/* A child has translations of its own, and must not find old ones in them. */
static bool by_fork(struct litmus *l, size_t i)
{
	const pid_t pid = fork();

	if (!pid)
		_exit(!by_pwrite(l, i) || l->f->mem[i * NR_WORDS] != l->value);
	return exits_well(pid);
}

/* A new program, see write_for_litmus(). */
static bool by_exec(struct litmus *l, size_t i)
{
	const pid_t pid = fork();
	char what[300];

	if (!pid) {
		snprintf(what, sizeof(what), "%zu %llu %s", i, (unsigned long long)l->value,
			 l->f->path);
		setenv("MIGRATE_DEFER_WRITE", what, 1);
		execl("/proc/self/exe", "migrate_defer", NULL);
		_exit(1);
	}
	return exits_well(pid);
}

__attribute__((constructor)) static void write_for_litmus(void)
{
	const char *what = getenv("MIGRATE_DEFER_WRITE");
	unsigned long long value;
	struct file f = {};
	struct litmus l = { .f = &f };
	size_t i;

	if (!what)
		return;
	if (sscanf(what, "%zu %llu %255s", &i, &value, f.path) != 3)
		_exit(2);
	l.value = value;
	_exit(!by_pwrite(&l, i));
}

/* Each of these has who reads the page find another one, or none at all. */
static bool by_unmapping(struct litmus *l, size_t i)
{
	return !munmap(l->f->mem + i * NR_WORDS, psize());
}

static bool by_protection(struct litmus *l, size_t i)
{
	return !mprotect(l->f->mem + i * NR_WORDS, psize(), PROT_NONE);
}

static bool by_moving_away(struct litmus *l, size_t i)
{
	static void *away;

	/* Not to where one has been before */
	if (!away)
		away = mmap(NULL, psize(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return mremap(l->f->mem + i * NR_WORDS, psize(), psize(),
		      MREMAP_MAYMOVE | MREMAP_FIXED, away) == away;
}

/* Another page, at the same address. */
static bool by_mapping_over(struct litmus *l, size_t i)
{
	uint64_t *new = mmap(NULL, psize(), PROT_READ | PROT_WRITE,
				      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	__atomic_store_n(new, l->value, __ATOMIC_RELAXED);
	return mremap(new, psize(), psize(), MREMAP_MAYMOVE | MREMAP_FIXED,
		      l->f->mem + i * NR_WORDS) != MAP_FAILED;
}

/* Restores what by_mapping_over() and by_cow() have put over a page. */
static void map_again(struct litmus *l, size_t i, int prot, int flags)
{
	const int fd = open(l->f->path, O_RDONLY | O_CLOEXEC);

	mmap(l->f->mem + i * NR_WORDS, psize(), prot, flags | MAP_FIXED,
	     fd, i * psize());
	close(fd);
}

/* A private mapping that becomes writable: the store is to a copy. */
static bool by_cow(struct litmus *l, size_t i)
{
	uint64_t *mem = l->f->mem + i * NR_WORDS;

	if (mprotect(mem, psize(), PROT_READ | PROT_WRITE))
		return false;
	__atomic_store_n(mem, l->value, __ATOMIC_RELAXED);
	return true;
}

/* How often the code in each page has been called. */
static atomic_ulong called[NR_LITMUS];

static void call(struct reader *r, size_t i)
{
	uint32_t (*code)(void);

	code = (void *)(r->f->mem + i * NR_WORDS + 1);
	if (code() != i)
		atomic_fetch_add(&r->wrong, 1);
	atomic_fetch_add(&called[i], 1);
}

/* A breakpoint in the code of a page, in a copy of it: each call from now on meets it. */
static bool by_uprobe(struct litmus *l, size_t i)
{
	struct perf_event_attr attr = {
		.type = read_num(UPROBES),
		.size = sizeof(attr),
		.uprobe_path = (uintptr_t)l->f->path,
		.probe_offset = i * psize() + 8,
	};
	const int fd = syscall(__NR_perf_event_open, &attr, -1, l->r->cpu, -1,
			       PERF_FLAG_FD_CLOEXEC);
	const unsigned long before = atomic_load(&called[i]);
	unsigned long calls;
	uint64_t met = 0;

	if (fd < 0)
		return false;
	wait_for_reader(l->r);
	/* One may have been under way, and one may not have been counted yet */
	calls = atomic_load(&called[i]) - before;
	if (read(fd, &met, sizeof(met)) != sizeof(met))
		return false;
	close(fd);
	return calls && met + 1 >= calls;
}

/* A thread that does nothing but be traced, and who traces it. */
static struct {
	pid_t tid, pid;
	int ask, answer;
} debugger;

static void *be_traced(void *arg)
{
	__atomic_store_n(&debugger.tid, gettid(), __ATOMIC_RELEASE);
	for (;;)
		pause();
	return NULL;
}

static void debug(int ask, int answer)
{
	uintptr_t poke[2];
	bool good;

	if (ptrace(PTRACE_ATTACH, debugger.tid, NULL, NULL) ||
	    waitpid(debugger.tid, NULL, __WALL) != debugger.tid)
		_exit(1);
	while (read(ask, poke, sizeof(poke)) == sizeof(poke)) {
		good = !ptrace(PTRACE_POKEDATA, debugger.tid, poke[0], poke[1]);
		if (write(answer, &good, sizeof(good)) != sizeof(good))
			break;
	}
	_exit(0);
}

static bool start_debugger(void)
{
	int ask[2], answer[2];
	pthread_t thread;

	if (pipe(ask) || pipe(answer))
		return false;
	prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
	pthread_create(&thread, NULL, be_traced, NULL);
	while (!__atomic_load_n(&debugger.tid, __ATOMIC_ACQUIRE))
		sched_yield();
	debugger.pid = fork();
	if (!debugger.pid) {
		close(ask[1]);
		debug(ask[0], answer[1]);
	}
	close(answer[1]);
	close(ask[0]);
	debugger.ask = ask[1];
	debugger.answer = answer[0];
	return debugger.pid > 0;
}

/* By a debugger: FOLL_FORCE. */
static bool by_force(struct litmus *l, size_t i)
{
	const uintptr_t poke[2] = { (uintptr_t)(l->f->mem + i * NR_WORDS), l->value };
	bool good;

	if (!debugger.pid && !start_debugger())
		return false;
	return write(debugger.ask, poke, sizeof(poke)) == sizeof(poke) &&
	       read(debugger.answer, &good, sizeof(good)) == sizeof(good) && good;
}

FIXTURE(litmus) {
	struct file f;
	struct reader r;
	struct litmus l;
};

FIXTURE_VARIANT(litmus) {
	bool (*change)(struct litmus *l, size_t i);
	int flags;
	bool once;		/* to each page: it is no longer that of the file */
	bool all;		/* it is all pages that are changed */
	bool single;		/* each page is moved by itself */
	int writers;
	bool flushes;		/* somebody else has the reader's CPU flush TLBs */
	bool same;		/* what is read does not change */
	bool slow;		/* processes are started, or stopped */
	bool switches;		/* it is switched off and on all the time */
};

FIXTURE_VARIANT_ADD(litmus, pwrite)
	{ .change = by_pwrite, .flags = MAP_SHARED, .writers = 1 };
FIXTURE_VARIANT_ADD(litmus, two_writers)
	{ .change = by_pwrite, .flags = MAP_SHARED, .writers = 2 };
FIXTURE_VARIANT_ADD(litmus, next_writer)
	{ .change = by_next_writer, .flags = MAP_SHARED, .writers = 1, .all = true,
	  .single = true };
FIXTURE_VARIANT_ADD(litmus, flushed_by_others)
	{ .change = by_pwrite, .flags = MAP_SHARED, .writers = 1, .flushes = true };
FIXTURE_VARIANT_ADD(litmus, switched)
	{ .change = by_pwrite, .flags = MAP_SHARED, .writers = 1, .switches = true };
FIXTURE_VARIANT_ADD(litmus, store)
	{ .change = by_store, .flags = MAP_SHARED, .writers = 1 };
FIXTURE_VARIANT_ADD(litmus, truncation)
	{ .change = by_truncation, .flags = MAP_SHARED, .writers = 1, .all = true };
FIXTURE_VARIANT_ADD(litmus, punching)
	{ .change = by_punching, .flags = MAP_SHARED, .writers = 1 };
FIXTURE_VARIANT_ADD(litmus, reclaim)
	{ .change = by_reclaim, .flags = MAP_SHARED, .writers = 1 };
FIXTURE_VARIANT_ADD(litmus, copying)
	{ .change = by_copying, .flags = MAP_SHARED, .writers = 1 };
FIXTURE_VARIANT_ADD(litmus, fork)
	{ .change = by_fork, .flags = MAP_SHARED, .writers = 1, .slow = true };
FIXTURE_VARIANT_ADD(litmus, exec)
	{ .change = by_exec, .flags = MAP_SHARED, .writers = 1, .slow = true };
FIXTURE_VARIANT_ADD(litmus, unmapping)
	{ .change = by_unmapping, .flags = MAP_SHARED, .once = true, .writers = 1 };
FIXTURE_VARIANT_ADD(litmus, protection)
	{ .change = by_protection, .flags = MAP_SHARED, .once = true, .writers = 1 };
FIXTURE_VARIANT_ADD(litmus, moving_away)
	{ .change = by_moving_away, .flags = MAP_SHARED, .once = true, .writers = 1 };
FIXTURE_VARIANT_ADD(litmus, mapping_over)
	{ .change = by_mapping_over, .flags = MAP_SHARED, .once = true, .writers = 1 };
FIXTURE_VARIANT_ADD(litmus, cow)
	{ .change = by_cow, .flags = MAP_PRIVATE, .once = true, .writers = 1 };
FIXTURE_VARIANT_ADD(litmus, force)
	{ .change = by_force, .flags = MAP_PRIVATE, .once = true, .writers = 1, .slow = true };
FIXTURE_VARIANT_ADD(litmus, uprobe)
	{ .change = by_uprobe, .flags = MAP_PRIVATE, .once = true, .writers = 1,
	  .same = true, .slow = true };

FIXTURE_SETUP(litmus)
{
	const char *why = switch_on();

	if (!why)
		why = make_file(&self->f, NR_LITMUS, variant->flags);
	if (!why && variant->change == by_uprobe && access(UPROBES, R_OK))
		why = "no CONFIG_UPROBE_EVENTS";
	if (why)
		SKIP(return, "%s", why);
	if (have_debug()) {
		put(DEBUG, "cap_pages", 4096);
		put(DEBUG, "delay_us", 100);
	}
	self->l.f = &self->f;
	self->l.r = &self->r;
	pthread_barrier_init(&self->l.both, NULL, 2);
	/* One that is not the file's any more keeps others from being deferred */
	self->l.call = variant->once || variant->single ? 1 : NR_LITMUS;
	if (variant->change == by_uprobe)
		mprotect(self->f.mem, NR_LITMUS * psize(), PROT_READ | PROT_EXEC);
	start_reader(&self->r, &self->f, 1);
	if (variant->change == by_uprobe)
		self->r.also = call;
	wait_for_reader(&self->r);
}

FIXTURE_TEARDOWN(litmus)
{
	if (self->r.thread)
		stop_reader(&self->r);
	switch_off();
	remove_file(&self->f);
}

/*
 * A process that once ran on the reader's CPU, and migrates memory of its own: this
 * CPU is asked to flush again and again, and finds that it is up to date.
 */
static pid_t have_flushes(struct file *f)
{
	const pid_t pid = fork();
	char *mem;

	if (pid)
		return pid;
	mem = mmap(NULL, NR_LITMUS * psize(), PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	run_on(1);
	memset(mem, 1, NR_LITMUS * psize());
	run_on(sysconf(_SC_NPROCESSORS_ONLN) - 1);
	for (int i = 0; i < NR_LITMUS; i++)
		f->pages[i] = mem + i * psize();
	for (int to = 0;; to = !to)
		move(f, 0, NR_LITMUS, to);
}

/* Opens the file whenever somebody else is about to, too. */
static void *open_and_close(void *arg)
{
	struct litmus *l = arg;

	run_on(sysconf(_SC_NPROCESSORS_ONLN) - 1);
	for (;;) {
		pthread_barrier_wait(&l->both);
		if (atomic_load(&l->stop))
			return NULL;
		close(open(l->f->path, O_RDWR | O_CLOEXEC));
	}
}

/* Until something is held that two writers can find. */
static void wait_for_deferral(void)
{
	const long pages = counter("migrate_defer_pages");
	const time_t end = time(NULL) + 5;

	while (counter("migrate_defer_pages") == pages && time(NULL) < end)
		sched_yield();
}

/* Until all that can be has been moved. */
static void wait_for_move(struct litmus *l)
{
	const unsigned long moves = atomic_load(&l->moves);

	while (atomic_load(&l->moves) == moves)
		sched_yield();
}

/* Clean again, so that what is migrated next can be deferred. */
static void write_back(struct litmus *l)
{
	const int fd = open(l->f->path, O_RDONLY | O_CLOEXEC);

	/* Not fsync(): what the filesystem notes about it does not matter */
	sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
				  SYNC_FILE_RANGE_WAIT_AFTER);
	close(fd);
}

/*
 * Mutants: migration does not look for a writer again (pwrite); clear before the drain
 * (two_writers); epoch read too late (flushed_by_others); what is pending is not
 * flushed by who unmaps (unmapping).
 */
TEST_F_TIMEOUT(litmus, nobody_reads_what_is_old, TIMEOUT)
{
	const char *asked = getenv("MIGRATE_DEFER_ROUNDS");
	const unsigned long all = asked ? strtoul(asked, NULL, 0) : ROUNDS;
	const unsigned long rounds = variant->slow ? all / 10 : all;
	const long before = counter("migrate_defer_pages");
	const long drains = counter("migrate_defer_drain_writer");
	const long synced = counter("migrate_defer_cpus_synced");
	pthread_t mover, writer;
	pid_t pid = 0;

	if (variant->flushes)
		pid = have_flushes(&self->f);
	pthread_create(&mover, NULL, move_all_the_time, &self->l);
	if (variant->writers > 1)
		pthread_create(&writer, NULL, open_and_close, &self->l);
	run_on(2);
	for (unsigned long n = 0; n < rounds; n++) {
		const size_t i = n % NR_LITMUS;

		self->l.nr = n + 2;
		self->l.value = version(i, n + 2);
		if (variant->writers > 1) {
			wait_for_deferral();
			pthread_barrier_wait(&self->l.both);
		}
		/* The writer finds nothing that is held then, or what is new */
		if (variant->switches && n % 4 == 0) {
			ASSERT_TRUE(put(SWITCHES, "enabled", 0));
			ASSERT_TRUE(put(SWITCHES, "enabled", 1));
		}
		ASSERT_TRUE(variant->change(&self->l, i));
		if (variant->all)
			for (size_t k = 0; k < NR_LITMUS; k++)
				atomic_store(&at_least[k], n + 2);
		else if (!variant->same)
			atomic_store(&at_least[i], n + 2);
		if (variant->once && i == NR_LITMUS - 1) {
			wait_for_reader(&self->r);
			for (size_t k = 0; k < NR_LITMUS; k++) {
				take_back(k, 1);
				map_again(&self->l, k, variant->same ?
					  PROT_READ | PROT_EXEC : PROT_READ, variant->flags);
			}
			wait_for_move(&self->l);
		}
		if (!variant->once)
			write_back(&self->l);
		/* All there is to be seen is gone with the next flush by others */
		if (variant->flushes)
			wait_for_move(&self->l);
		/* So that the next one meets any moment of a move */
		usleep(random() % 4000);
	}
	atomic_store(&self->l.stop, true);
	pthread_join(mover, NULL);
	if (variant->writers > 1) {
		pthread_barrier_wait(&self->l.both);
		pthread_join(writer, NULL);
	}
	stop_reader(&self->r);
	self->r.thread = 0;
	if (debugger.pid) {
		kill(debugger.pid, SIGKILL);
		waitpid(debugger.pid, NULL, 0);
	}

	EXPECT_EQ(atomic_load(&self->r.old), 0);
	EXPECT_EQ(atomic_load(&self->r.wrong), 0);
	EXPECT_EQ(wrong_words(&self->f), 0);
	EXPECT_GT(counter("migrate_defer_pages"), before);
	if (!variant->once)
		EXPECT_GT(counter("migrate_defer_drain_writer"), drains);
	if (pid) {
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
		EXPECT_GT(counter("migrate_defer_cpus_synced"), synced);
	}
	TH_LOG("%lu pages deferred, %lu drains for a writer, read %lu times, moved %lu times",
	       counter("migrate_defer_pages") - before,
	       counter("migrate_defer_drain_writer") - drains,
	       atomic_load(&self->r.rounds), atomic_load(&self->l.moves));
}

TEST_HARNESS_MAIN
