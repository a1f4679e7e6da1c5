// SPDX-License-Identifier: GPL-2.0
/*
 * Folios of a batch that are copied by an engine, before they are moved, are what
 * they were, whoever writes to them, pins them, switches engines or takes CPUs away
 * meanwhile; and helpers run only where they may.
 *
 * What a word holds depends on its place and on a generation, so that neither a page
 * that was not copied nor an old copy passes. Memory goes to and fro between two
 * nodes: a folio with a leaked reference moves once and never again. Counters say
 * whether an engine copied at all.
 *
 * "Kills mutant N" names deliberate bugs that a test is meant to notice:
 *
 * 61 folios with buffer heads are copied ahead, too: contents.pingpong of files,
 *   metadata.storm
 * 62 the copy is begun before TLBs are flushed: writers.lose_nothing
 * 63 what was copied once is taken for copied when the folio is tried again:
 *   faults.again
 * 64 references to the source are not looked at: pins.aio, pins.process_vm,
 *   pins.longterm, pins.vmsplice
 * 65 the last slice of a batch is not copied: contents.pingpong
 * 66 the destination of a copy that timed out is used again: dma.hang
 * 67 who migrates does not wait for what helpers copy: contents.pingpong
 * 68 busy CPUs are asked to help: where.busy
 * 69 a task with a quota has helpers: cgroup.limit
 * 70 a channel is taken for the one that had its place before and hangs:
 *   dma.unbind_while_it_hangs
 * 71 any driver that says so is believed to have stopped its device: dma.forgotten
 *
 * MIGRATE_TEST_DIR says where files are made (.), which should be an ext4.
 */
#define _GNU_SOURCE
#include "kselftest_harness.h"
#include <dirent.h>
#include <limits.h>
#include <linux/aio_abi.h>
#include <linux/loop.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <time.h>
#include "migrate_util.h"

#define SWITCHES	"/sys/kernel/mm/migrate_copy/"
#define FAULTS		"/sys/kernel/debug/fail_migrate_copy/"
#define DMA_TEST	"/sys/kernel/debug/migrate_copy_dma_test/"
#define DMA_DRIVER	"/sys/bus/platform/drivers/migrate-copy-dma-test/"
#define DMA_DEVICE	"migrate-copy-dma-test.0"
#define WQ_CPUMASK	"/sys/devices/virtual/workqueue/cpumask"
#define TRACING		"/sys/kernel/tracing/instances/migrate_batch_copy/"

#define READ_ONCE(x)	 __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define WRITE_ONCE(x, v) __atomic_store_n(&(x), v, __ATOMIC_RELAXED)

#define MiB		(1024UL * 1024)
#define GROUP		(4 * MiB)
#define MAX_WORKERS	4
#define MAX_CPUS	64
#define TIMEOUT		240
/* Moves of an area, and what its workers do meanwhile; whichever takes longer. */
#define NR_MOVES	4
#define MAX_MOVES	400
#define KPF_SWAPCACHE_BIT	BIT_ULL(13)
#define KPF_KSM_BIT		BIT_ULL(21)

enum memory {
	MIXED,		/* anonymous, folios of several sizes side by side */
	MTHP,		/* anonymous, folios that PTEs map */
	SMALL,		/* anonymous, single pages */
	THP,		/* anonymous, one THP after the other */
	SHMEM,
	FILE_CLEAN,	/* as it was read from the disk */
	FILE_DIRTY,	/* half of it written to */
};

/* What is migrated. */
struct area {
	enum memory kind;
	char *mem;
	size_t nr;		/* of pages */
	int fd;
	bool writers;		/* one word of each page is somebody else's */
	unsigned int *gen;	/* of each page */
	int node[2];
	int at;			/* which of them it was moved to */

	/* As find_folios() saw them last. */
	size_t nr_folios;
	void **folios;
	int *targets;
	int *status;
	uint64_t *flags;	/* of each page, from kpageflags */
};

/* --- Files that have one value ------------------------------------------- */

static bool put_str(const char *path, const char *value)
{
	const int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool good;

	if (fd < 0)
		return false;
	good = write(fd, value, strlen(value)) == (ssize_t)strlen(value);
	close(fd);
	return good;
}

static bool put_in(const char *dir, const char *name, const char *value)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s%s", dir, name);
	return put_str(path, value);
}

static bool put_num(const char *dir, const char *name, long value)
{
	char buf[32];

	snprintf(buf, sizeof(buf), "%ld", value);
	return put_in(dir, name, buf);
}

static bool get_str(const char *dir, const char *name, char *buf, size_t size)
{
	char path[PATH_MAX];
	ssize_t len;
	int fd;

	snprintf(path, sizeof(path), "%s%s", dir, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	len = read(fd, buf, size - 1);
	close(fd);
	buf[len > 0 ? len : 0] = '\0';
	return len > 0;
}

static long get_num(const char *dir, const char *name)
{
	char buf[64];

	return get_str(dir, name, buf, sizeof(buf)) ? strtol(buf, NULL, 10) : -1;
}

/* --- Switches -------------------------------------------------------------- */

static struct {
	const char *name;
	char value[256];
} switches[] = {
	{ "engine" }, { "reasons" }, { "bulk" }, { "max_helpers" },
	{ "dma_timeout_ms" },
};

static const struct {
	const char *path;
	const char *quiet;
} others[] = {
	{ "/proc/sys/kernel/numa_balancing", "0" },
	{ "/proc/sys/vm/compaction_proactiveness", "0" },
	{ "/sys/kernel/mm/numa/demotion_enabled", "0" },
	{ "/sys/kernel/mm/ksm/run", "0" },
};

static char others_saved[ARRAY_SIZE(others)][64];

/* Of "a [b] c [d]", what has to be written to have it again: "b,d,". */
static void keep_chosen(char *value)
{
	char *to = value, *word, *rest = value;

	if (!strchr(value, '[')) {
		if (strchr(value, ' '))
			strcpy(value, "none");
		return;
	}
	while ((word = strsep(&rest, "\n "))) {
		const size_t len = strlen(word);

		if (word[0] != '[')
			continue;
		memmove(to, word + 1, len - 2);
		to += len - 2;
		*to++ = ',';
	}
	to[-1] = '\0';
}

static void save_switches(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(switches); i++)
		if (get_str(SWITCHES, switches[i].name, switches[i].value,
			    sizeof(switches[i].value)))
			keep_chosen(switches[i].value);
	for (size_t i = 0; i < ARRAY_SIZE(others); i++)
		if (get_str("", others[i].path, others_saved[i],
			    sizeof(others_saved[i])))
			put_str(others[i].path, others[i].quiet);
}

static const char * const faults[] = {
	"folio", "helper", "batch", "poison", "map", "again",
};

static void restore_switches(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(faults); i++) {
		char dir[128];

		snprintf(dir, sizeof(dir), FAULTS "%s/", faults[i]);
		put_in(dir, "probability", "0");
	}
	for (size_t i = 0; i < ARRAY_SIZE(switches); i++)
		if (switches[i].value[0])
			put_in(SWITCHES, switches[i].name, switches[i].value);
	/* If a test of them was killed. */
	put_in(DMA_TEST, "mode", "ok");
	put_num(DMA_TEST, "final", 1);
}

static void restore_others(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(others); i++)
		if (others_saved[i][0])
			put_str(others[i].path, others_saved[i]);
}

/* Have a @fault for each @interval-th who asks, @times times. */
static bool arm(const char *fault, long interval, long times)
{
	char dir[128];

	snprintf(dir, sizeof(dir), FAULTS "%s/", fault);
	return put_num(dir, "verbose", 0) && put_num(dir, "interval", interval) &&
	       put_num(dir, "times", times) && put_num(dir, "probability", 100);
}

/* Why not, or NULL. */
static const char *use_engine(const char *name)
{
	char names[256];

	if (geteuid())
		return "needs root";
	if (!get_str(SWITCHES, "engine", names, sizeof(names)))
		return "the kernel copies no batches";
	if (!strstr(names, name))
		return "there is no such engine";
	if (!strcmp(name, "dma") && access(DMA_TEST, F_OK))
		return "there is no device to copy with";
	if (!put_in(SWITCHES, "engine", name))
		return "the engine can not be used";
	/* It has to wait for CPUs, as long as a busy machine takes. */
	put_num(SWITCHES, "dma_timeout_ms", 10000);
	return NULL;
}

static long counted(const char *name)
{
	char key[64];

	snprintf(key, sizeof(key), "migrate_copy_%s", name);
	return read_named("/proc/vmstat", key);
}

/* Helpers count when they are done: later than the migration that they help. */
static long counted_for_good(const char *name)
{
	long old = counted(name), new;

	for (;; old = new) {
		usleep(20000);
		new = counted(name);
		if (new == old)
			return new;
	}
}

static int nr_cpus(void)
{
	return sysconf(_SC_NPROCESSORS_ONLN);
}

/* --- Contents -------------------------------------------------------------- */

static uint64_t pattern(size_t word, unsigned int gen)
{
	return (word + 1) * 0x9e3779b97f4a7c15ULL ^
	       (gen + 1) * 0xc2b2ae3d27d4eb4fULL;
}

static size_t page_words(void)
{
	return psize() / sizeof(uint64_t);
}

/* Writers take the same word of as many pages, to be fast. */
#define RUN	32

static size_t writer_word(size_t page)
{
	return page / RUN * 37 % page_words();
}

static char *page_of(const struct area *a, size_t page)
{
	return a->mem + page * psize();
}

static void fill_mem(void *mem, size_t page, unsigned int gen)
{
	uint64_t *words = mem;

	for (size_t i = 0; i < page_words(); i++)
		words[i] = pattern(page * page_words() + i, gen);
}

static bool mem_is(const void *mem, size_t page, unsigned int gen, size_t spare)
{
	const uint64_t *words = mem;
	uint64_t bad = 0;

	for (size_t i = 0; i < page_words(); i++)
		if (i != spare)
			bad |= words[i] ^ pattern(page * page_words() + i, gen);
	return !bad;
}

static void fill_page(struct area *a, size_t page, unsigned int gen)
{
	uint64_t *words = (uint64_t *)page_of(a, page);
	const size_t spare = writer_word(page);

	a->gen[page] = gen;
	for (size_t i = 0; i < page_words(); i++)
		if (!a->writers || i != spare)
			words[i] = pattern(page * page_words() + i, gen);
}

/* Every @step-th page. */
static void fill(struct area *a, unsigned int gen, size_t step)
{
	for (size_t i = 0; i < a->nr; i += step)
		fill_page(a, i, gen);
}

/* The first page that is not what it should be, or -1. */
static ssize_t bad_page(const struct area *a)
{
	for (size_t i = 0; i < a->nr; i++)
		if (!mem_is(page_of(a, i), i, a->gen[i],
			    a->writers ? writer_word(i) : SIZE_MAX))
			return i;
	return -1;
}

/* --- Areas ----------------------------------------------------------------- */

static void allow_only(size_t size)
{
	char name[64];

	static unsigned long orders;

	orders = orders ?: thp_supported_orders();
	for (int order = 1; order < NR_ORDERS; order++) {
		const size_t this = (size_t)psize() << order;

		if (!(orders & (1UL << order)))
			continue;
		snprintf(name, sizeof(name), "hugepages-%zukB/enabled", this >> 10);
		thp_write_string(name, this == size ? "madvise" : "never");
	}
}

/* Folios of @size where there are none yet. */
static void populate(char *mem, size_t len, size_t size)
{
	allow_only(size);
	madvise(mem, len, size > psize() ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	for (size_t i = 0; i < len; i += psize())
		mem[i] = 1;
	allow_only(0);
}

/* 2 MiB at a time get smaller and smaller folios, and all sizes are a GROUP. */
static void populate_mixed(char *mem)
{
	static const struct {
		size_t size, nr;
	} parts[] = {
		{ 2 * MiB, 1 }, { MiB / 2, 2 }, { MiB / 4, 2 }, { MiB / 16, 4 },
		{ MiB / 64, 8 }, { MiB / 256, 32 },
	};

	for (size_t i = 0; i < ARRAY_SIZE(parts); i++) {
		populate(mem, parts[i].size * parts[i].nr, parts[i].size);
		mem += parts[i].size * parts[i].nr;
	}
}

static void populate_anon(struct area *a)
{
	static const size_t sizes[] = {
		[MTHP] = MiB / 16, [SMALL] = 0, [THP] = 2 * MiB,
	};

	if (a->kind == MIXED)
		for (size_t i = 0; i < a->nr * psize(); i += GROUP)
			populate_mixed(a->mem + i);
	else
		populate(a->mem, a->nr * psize(), sizes[a->kind] ?: psize());
}

static bool write_file_pages(int fd, size_t first, size_t nr, unsigned int gen)
{
	char *buf = mmap(NULL, psize(), PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	bool good = buf != MAP_FAILED;

	for (size_t i = 0; good && i < nr; i++) {
		fill_mem(buf, i, gen);
		good = pwrite(fd, buf, psize(), (first + i) * psize()) == psize();
	}
	munmap(buf, psize());
	return good && !fsync(fd);
}

/* What was written has buffer heads, what is read has not. */
static bool open_area_file(struct area *a)
{
	a->fd = a->kind == SHMEM ? memfd_create("migrate_batch_copy", 0) :
				   open_disk_file(0);
	if (a->fd < 0 || ftruncate(a->fd, a->nr * psize()))
		return false;
	return a->kind == SHMEM ||
	       (write_file_pages(a->fd, 0, a->nr, 0) &&
		!posix_fadvise(a->fd, 0, 0, POSIX_FADV_DONTNEED));
}

static bool map_area(struct area *a)
{
	const size_t len = a->nr * psize();
	char *map = mmap(NULL, len + GROUP, PROT_NONE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (map == MAP_FAILED)
		return false;
	a->mem = map + GROUP - (uintptr_t)map % GROUP;
	if (mmap(a->mem, len, PROT_READ | PROT_WRITE, MAP_FIXED |
		 (a->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED), a->fd, 0)
	    != a->mem)
		return false;
	if (a->fd < 0)
		populate_anon(a);
	return true;
}

static bool alloc_tables(struct area *a)
{
	a->gen = calloc(a->nr, sizeof(*a->gen));
	a->folios = calloc(a->nr, sizeof(*a->folios));
	a->targets = calloc(a->nr, sizeof(*a->targets));
	a->status = calloc(a->nr, sizeof(*a->status));
	a->flags = calloc(a->nr, sizeof(*a->flags));
	return a->gen && a->folios && a->targets && a->status && a->flags;
}

static uint64_t pagemap_of(int fd, const void *addr)
{
	uint64_t entry = 0;

	if (pread(fd, &entry, sizeof(entry),
		  (uintptr_t)addr / psize() * sizeof(entry)) != sizeof(entry))
		return 0;
	return entry;
}

/* What kpageflags has for a page that is mapped; KPF_TAIL if it is not. */
static uint64_t flags_of(int pagemap, int kpageflags, const void *addr)
{
	const uint64_t entry = pagemap_of(pagemap, addr);
	uint64_t flags;

	if (!(entry & PM_PRESENT) ||
	    pread(kpageflags, &flags, sizeof(flags),
		  PAGEMAP_PFN(entry) * sizeof(flags)) != sizeof(flags))
		return KPF_COMPOUND_TAIL;
	return flags;
}

/* So that small and large ones share a batch. */
static void shuffle(struct area *a)
{
	uint32_t seed = 1;

	for (size_t i = a->nr_folios; i > 1; i--) {
		void **last = &a->folios[i - 1], **other, *tmp;

		seed = seed * 1664525 + 1013904223;
		other = &a->folios[(seed >> 8) % i];
		tmp = *last;
		*last = *other;
		*other = tmp;
	}
}

/* move_pages() wants one address of each folio. */
static void find_folios(struct area *a)
{
	const int pagemap = open("/proc/self/pagemap", O_RDONLY);
	const int kpageflags = open("/proc/kpageflags", O_RDONLY);

	a->nr_folios = 0;
	for (size_t i = 0; i < a->nr; i++) {
		a->flags[i] = flags_of(pagemap, kpageflags, page_of(a, i));
		if (!(a->flags[i] & KPF_COMPOUND_TAIL))
			a->folios[a->nr_folios++] = page_of(a, i);
	}
	close(pagemap);
	close(kpageflags);
	shuffle(a);
}

/* As the system call: 0, the number of folios that stay, or a negative errno. */
static long move_pages_to(struct area *a, int node)
{
	long ret;

	find_folios(a);
	for (size_t i = 0; i < a->nr_folios; i++)
		a->targets[i] = node;
	ret = syscall(__NR_move_pages, 0, a->nr_folios, a->folios, a->targets,
		      a->status, MPOL_MF_MOVE_ALL);
	return ret < 0 ? -errno : ret;
}

/* Generation 0 of it, on the first node; why not, or NULL. */
static const char *make_area(struct area *a, enum memory kind, size_t len)
{
	a->kind = kind;
	a->nr = len / psize();
	a->fd = -1;
	if (!two_nodes(a->node))
		return "needs two nodes with memory";
	if (kind < SHMEM && !thp_available())
		return "no THP";
	if (!alloc_tables(a))
		return "no memory";
	if (kind >= SHMEM && !open_area_file(a))
		return "no file system on a disk (MIGRATE_TEST_DIR)";
	if (!map_area(a))
		return "no memory";
	if (kind < FILE_CLEAN)
		fill(a, 0, 1);
	else
		force_read_pages(a->mem, a->nr, psize());
	move_pages_to(a, a->node[0]);
	return NULL;
}

/* --- Moving ---------------------------------------------------------------- */

static long mbind_to(struct area *a, int node)
{
	return mbind_node(a->mem, a->nr * psize(), node,
			  MPOL_MF_MOVE_ALL | MPOL_MF_STRICT) ? -errno : 0;
}

/* To the other node. */
static long move(struct area *a, bool by_mbind)
{
	const int node = a->node[a->at ^= 1];

	return by_mbind ? mbind_to(a, node) : move_pages_to(a, node);
}

/* Pages that are not where the last move should have brought them. */
static size_t nr_elsewhere(struct area *a)
{
	size_t nr = 0;
	void **pages = calloc(a->nr, sizeof(*pages));

	for (size_t i = 0; i < a->nr; i++)
		pages[i] = page_of(a, i);
	if (syscall(__NR_move_pages, 0, a->nr, pages, NULL, a->status, 0))
		nr = a->nr;
	else
		for (size_t i = 0; i < a->nr; i++)
			nr += a->status[i] != a->node[a->at];
	free(pages);
	return nr;
}

/* A move of which nothing may fail. */
static void move_all(struct __test_metadata *_metadata, struct area *a, bool by_mbind)
{
	long ret = 0;

	/* Readahead, writeback and the like have references, but not for long. */
	for (int attempt = 0; attempt < 20; attempt++) {
		ret = move(a, by_mbind);
		if (!ret || a->kind < SHMEM)
			break;
		a->at ^= 1;
	}
	EXPECT_EQ(ret, 0);
	EXPECT_EQ(nr_elsewhere(a), 0);
	ASSERT_EQ(bad_page(a), -1);
}

static void expect_nothing_isolated(struct __test_metadata *_metadata)
{
	for (int i = 0; i < 100; i++) {
		if (!read_named("/proc/vmstat", "nr_isolated_anon") &&
		    !read_named("/proc/vmstat", "nr_isolated_file"))
			return;
		put_str("/proc/sys/vm/stat_refresh", "1");
		usleep(10000);
	}
	EXPECT_EQ(read_named("/proc/vmstat", "nr_isolated_anon"), 0);
	EXPECT_EQ(read_named("/proc/vmstat", "nr_isolated_file"), 0);
}

/* --- Workers: they use a part of the area while it is moved ---------------- */

struct worker;

struct work {
	const char *name;
	/* Opens what is needed; why not, or NULL. Optional. */
	const char *(*begin)(struct worker *w);
	/* Uses the part once; false if it is not what was made of it. */
	bool (*step)(struct worker *w);
	enum memory kind;		/* of the area */
	size_t len;
	const char *event;	/* a counter that must rise */
};

struct worker {
	pthread_t thread;
	const struct work *work;
	struct area *a;
	size_t first, nr;	/* pages */
	bool stop;
	bool lost;		/* what was written */
	unsigned int steps;	/* how often */
	int fd, pipe[2];
	aio_context_t aio;
	char *buf;		/* as large as the part */
};

static char *part_of(const struct worker *w)
{
	return page_of(w->a, w->first);
}

static void *run_worker(void *arg)
{
	struct worker *w = arg;

	while (!READ_ONCE(w->stop)) {
		if (!w->work->step(w)) {
			WRITE_ONCE(w->lost, true);
			break;
		}
		WRITE_ONCE(w->steps, w->steps + 1);
	}
	return NULL;
}

static bool buf_is(const struct worker *w, const char *buf, unsigned int gen)
{
	for (size_t i = 0; i < w->nr; i++)
		if (!mem_is(buf + i * psize(), w->first + i, gen, SIZE_MAX))
			return false;
	return true;
}

static void fill_buf(const struct worker *w, char *buf, unsigned int gen)
{
	for (size_t i = 0; i < w->nr; i++)
		fill_mem(buf + i * psize(), w->first + i, gen);
}

/* From now on, the part is meant to be of @gen. */
static void note_gen(struct worker *w, unsigned int gen)
{
	for (size_t i = 0; i < w->nr; i++)
		w->a->gen[w->first + i] = gen;
}

static const char *alloc_buf(struct worker *w)
{
	w->buf = mmap(NULL, w->nr * psize(), PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	return w->buf == MAP_FAILED ? "no memory" : NULL;
}

/*
 * A write through a TLB entry that ought to have been flushed is lost. All stores
 * of a run follow one another with no branch between: a CPU that is slow to be
 * interrupted still does some of them.
 */
static bool write_run(uint64_t *word, uint64_t value)
{
	const size_t stride = page_words();
	bool good = true;

	for (int i = 0; i < RUN; i++)
		good &= READ_ONCE(word[i * stride]) == value;
#pragma GCC unroll 32
	for (int i = 0; i < RUN; i++)
		WRITE_ONCE(word[i * stride], value + 1);
	return good;
}

static bool write_words(struct worker *w)
{
	for (size_t i = w->first; i < w->first + w->nr; i += RUN) {
		uint64_t *words = (uint64_t *)page_of(w->a, i);

		if (!write_run(words + writer_word(i), w->steps))
			return false;
	}
	return true;
}

static const char *begin_writing(struct worker *w)
{
	w->a->writers = true;
	for (size_t i = w->first; i < w->first + w->nr; i++)
		((uint64_t *)page_of(w->a, i))[writer_word(i)] = 0;
	return NULL;
}

/* The file: generations 0 and 1 of the part, and room for what is written. */
static const char *begin_aio(struct worker *w)
{
	alloc_buf(w);
	w->fd = open_disk_file(O_DIRECT);
	if (w->fd < 0)
		return "no file for direct I/O (MIGRATE_TEST_DIR)";
	for (unsigned int gen = 0; gen < 2; gen++) {
		fill_buf(w, w->buf, gen);
		if (pwrite(w->fd, w->buf, w->nr * psize(), gen * w->nr * psize()) < 0)
			return "no direct I/O";
	}
	return syscall(__NR_io_setup, 8, &w->aio) ? "no aio" : NULL;
}

/* Eight requests at once, from or to the part, which are pinned meanwhile. */
static bool aio(struct worker *w, int opcode, size_t file_page)
{
	const size_t len = w->nr * psize() / 8;
	struct iocb cbs[8] = {}, *list[8];
	struct io_event events[8];

	for (int i = 0; i < 8; i++) {
		cbs[i] = (struct iocb) {
			.aio_lio_opcode = opcode,
			.aio_fildes = w->fd,
			.aio_buf = (uintptr_t)part_of(w) + i * len,
			.aio_nbytes = len,
			.aio_offset = file_page * psize() + i * len,
		};
		list[i] = &cbs[i];
	}
	if (syscall(__NR_io_submit, w->aio, 8, list) != 8 ||
	    syscall(__NR_io_getevents, w->aio, 8, 8, events, NULL) != 8)
		return false;
	for (int i = 0; i < 8; i++)
		if (events[i].res != (__s64)len)
			return false;
	return true;
}

static bool step_aio(struct worker *w)
{
	const unsigned int gen = w->steps % 2;
	const size_t len = w->nr * psize();

	note_gen(w, gen);
	return aio(w, IOCB_CMD_PREAD, gen * w->nr) && buf_is(w, part_of(w), gen) &&
	       aio(w, IOCB_CMD_PWRITE, 2 * w->nr) &&
	       pread(w->fd, w->buf, len, 2 * len) == (ssize_t)len &&
	       buf_is(w, w->buf, gen);
}

static bool step_process_vm(struct worker *w)
{
	const unsigned int gen = w->steps + 1;
	struct iovec mine = { w->buf, w->nr * psize() };
	struct iovec its = { part_of(w), w->nr * psize() };

	fill_buf(w, w->buf, gen);
	note_gen(w, gen);
	if (process_vm_writev(getpid(), &mine, 1, &its, 1, 0) !=
	    (ssize_t)mine.iov_len || !buf_is(w, part_of(w), gen))
		return false;
	memset(w->buf, 0, mine.iov_len);
	return process_vm_readv(getpid(), &mine, 1, &its, 1, 0) ==
	       (ssize_t)mine.iov_len && buf_is(w, w->buf, gen);
}

static const char *begin_vmsplice(struct worker *w)
{
	alloc_buf(w);
	return pipe(w->pipe) ? "no pipe" : NULL;
}

/* What is in the pipe is the memory itself, to which is written afterwards. */
static bool step_vmsplice(struct worker *w)
{
	const unsigned int gen = w->steps + 1;
	ssize_t len;

	for (size_t done = 0; done < w->nr; done += len / psize()) {
		struct iovec part = {
			part_of(w) + done * psize(), (w->nr - done) * psize()
		};

		len = vmsplice(w->pipe[1], &part, 1, 0);
		if (len <= 0)
			return false;
		for (size_t i = 0; i < len / psize(); i++) {
			fill_mem(part.iov_base + i * psize(), w->first + done + i, gen);
			w->a->gen[w->first + done + i] = gen;
		}
		for (ssize_t got = 0, ret; got < len; got += ret) {
			ret = read(w->pipe[0], w->buf + done * psize() + got, len - got);
			if (ret <= 0)
				return false;
		}
	}
	return buf_is(w, w->buf, gen);
}

static const char *begin_longterm(struct worker *w)
{
	alloc_buf(w);
	return access("/sys/kernel/debug/gup_test", R_OK | W_OK) ?
	       "no gup_test in debugfs" : NULL;
}

/* What is written through page tables is read through the pins. */
static bool step_longterm(struct worker *w)
{
	const unsigned int gen = w->steps + 1;
	const int fd = pin(part_of(w), w->nr * psize(),
			   PIN_LONGTERM_TEST_FLAG_USE_WRITE |
			   (w->steps % 2 ? PIN_LONGTERM_TEST_FLAG_USE_FAST : 0));
	__u64 buf = (uintptr_t)w->buf;
	bool good = true;

	/* It may be that folios which are migrated can not be pinned now. */
	if (fd < 0)
		return true;
	fill_buf(w, part_of(w), gen);
	note_gen(w, gen);
	if (!ioctl(fd, PIN_LONGTERM_TEST_READ, &buf))
		good = buf_is(w, w->buf, gen);
	close(fd);
	return good;
}

/* By write(), which waits for the folio lock, and read(), which has references. */
static bool step_read_write(struct worker *w)
{
	const unsigned int gen = w->steps / 64 + 1;
	const ssize_t len = w->nr * psize();
	const off_t pos = w->first * psize();

	if (w->steps % 64 == 0) {
		fill_buf(w, w->buf, gen);
		note_gen(w, gen);
		if (pwrite(w->a->fd, w->buf, len, pos) != len)
			return false;
	}
	return pread(w->a->fd, w->buf, len, pos) == len && buf_is(w, w->buf, gen);
}

static const struct work writing = {
	"writers", begin_writing, write_words, MTHP, 4 * MiB, NULL,
};

static bool start_worker(struct __test_metadata *_metadata, struct worker *w,
			 struct area *a, const struct work *work, int nr, int of)
{
	const char *why;

	w->work = work;
	w->a = a;
	w->nr = a->nr / of;
	w->first = nr * w->nr;
	why = work->begin ? work->begin(w) : NULL;
	if (why)
		SKIP(return false, "%s", why);
	ASSERT_EQ(pthread_create(&w->thread, NULL, run_worker, w), 0);
	return true;
}

static bool start_workers(struct __test_metadata *_metadata, struct worker *w,
			  struct area *a, const struct work *work, int nr)
{
	for (int i = 0; i < nr; i++)
		if (!start_worker(_metadata, &w[i], a, work, i, nr))
			return false;
	return true;
}

static void stop_workers(struct __test_metadata *_metadata, struct worker *w, int nr)
{
	for (int i = 0; i < nr; i++)
		WRITE_ONCE(w[i].stop, true);
	for (int i = 0; i < nr; i++) {
		ASSERT_EQ(pthread_join(w[i].thread, NULL), 0);
		EXPECT_FALSE(w[i].lost) {
			TH_LOG("%s: lost in step %u", w[i].work->name, w[i].steps);
		}
	}
}

static bool worked(const struct worker *w, int nr, unsigned int steps)
{
	for (int i = 0; i < nr; i++)
		if (READ_ONCE(w[i].steps) < steps && !READ_ONCE(w[i].lost))
			return false;
	return true;
}

/* To and fro; some folios may stay, because of those who use them. */
static void move_under(struct __test_metadata *_metadata, struct area *a,
		       struct worker *w, int nr, int nr_moves, unsigned int nr_steps)
{
	long ret;
	int i;

	for (i = 0; i < MAX_MOVES; i++) {
		if (i >= nr_moves && worked(w, nr, nr_steps))
			break;
		ret = move(a, i % 4 == 3);
		ASSERT_TRUE(ret >= 0 || ret == -ENOMEM || ret == -EIO);
		for (int j = 0; j < nr; j++)
			ASSERT_FALSE(READ_ONCE(w[j].lost));
	}
	ASSERT_TRUE(worked(w, nr, nr_steps));
}

/* --- Contents -------------------------------------------------------------- */

FIXTURE(contents) {
	struct area a;
};

FIXTURE_VARIANT(contents) {
	const char *engine;
	enum memory kind;
};

FIXTURE_VARIANT_ADD(contents, mixed_off) {
	.engine = "off", .kind = MIXED,
};

FIXTURE_VARIANT_ADD(contents, mixed_threads) {
	.engine = "threads", .kind = MIXED,
};

FIXTURE_VARIANT_ADD(contents, small_threads) {
	.engine = "threads", .kind = SMALL,
};

FIXTURE_VARIANT_ADD(contents, shmem_off) {
	.engine = "off", .kind = SHMEM,
};

FIXTURE_VARIANT_ADD(contents, shmem_threads) {
	.engine = "threads", .kind = SHMEM,
};

FIXTURE_VARIANT_ADD(contents, file_off) {
	.engine = "off", .kind = FILE_CLEAN,
};

FIXTURE_VARIANT_ADD(contents, file_threads) {
	.engine = "threads", .kind = FILE_CLEAN,
};

FIXTURE_VARIANT_ADD(contents, dirty_file_off) {
	.engine = "off", .kind = FILE_DIRTY,
};

FIXTURE_VARIANT_ADD(contents, dirty_file_threads) {
	.engine = "threads", .kind = FILE_DIRTY,
};

FIXTURE_VARIANT_ADD(contents, mixed_dma) {
	.engine = "dma", .kind = MIXED,
};

FIXTURE_VARIANT_ADD(contents, shmem_dma) {
	.engine = "dma", .kind = SHMEM,
};

FIXTURE_VARIANT_ADD(contents, file_dma) {
	.engine = "dma", .kind = FILE_CLEAN,
};

FIXTURE_VARIANT_ADD(contents, dirty_file_dma) {
	.engine = "dma", .kind = FILE_DIRTY,
};

FIXTURE_SETUP(contents)
{
	const char *why = use_engine(variant->engine);

	if (!why)
		why = make_area(&self->a, variant->kind,
				variant->kind == MIXED ? 5 * GROUP : 2 * GROUP);
	if (why) {
		restore_switches();
		SKIP(return, "%s", why);
	}
}

FIXTURE_TEARDOWN(contents)
{
	restore_switches();
}

/* Of what is to be copied by it. */
static const char *pages_event(const char *engine)
{
	return strcmp(engine, "dma") ? "threads_pages" : "dma_pages";
}

static void expect_engine_used(struct __test_metadata *_metadata, const char *engine,
			       long old)
{
	const bool used = counted(pages_event(engine)) > old;

	EXPECT_EQ(used, strcmp(engine, "off") && nr_cpus() > 1);
}

/* After the last round, the disk has what memory had. */
static void expect_on_disk(struct __test_metadata *_metadata, struct area *a)
{
	ASSERT_EQ(fsync(a->fd), 0);
	ASSERT_EQ(madvise(a->mem, a->nr * psize(), MADV_DONTNEED), 0);
	ASSERT_EQ(posix_fadvise(a->fd, 0, 0, POSIX_FADV_DONTNEED), 0);
	EXPECT_EQ(bad_page(a), -1);
}

/*
 * To and fro, folios of all sizes in each call, and every other page of a dirty file
 * with buffer heads. Kills mutants 61 (with a dirty file), 65 and 67.
 */
TEST_F_TIMEOUT(contents, pingpong, TIMEOUT)
{
	struct area *a = &self->a;
	const long old = counted(pages_event(variant->engine));
	const long small = counted("refused_private");

	if (a->kind == MIXED) {
		find_folios(a);
		EXPECT_GT(a->nr_folios, 200);
		EXPECT_LT(a->nr_folios, a->nr / 10);
	}
	for (int i = 1; i <= NR_MOVES; i++) {
		if (a->kind != FILE_CLEAN)
			fill(a, i, a->kind == FILE_DIRTY ? 2 : 1);
		move_all(_metadata, a, i % 3 == 0);
	}
	if (a->kind != FILE_DIRTY)
		expect_engine_used(_metadata, variant->engine, old);
	else if (strcmp(variant->engine, "off"))
		EXPECT_GT(counted("refused_private"), small);
	if (a->kind >= FILE_CLEAN)
		expect_on_disk(_metadata, a);
	expect_nothing_isolated(_metadata);
}

FIXTURE(threads) {
	struct area a;
};

FIXTURE_SETUP(threads)
{
	const char *why = use_engine("threads");

	if (!why)
		why = make_area(&self->a, THP, GROUP);
	if (!why && nr_cpus() < 2)
		why = "needs two CPUs";
	if (why) {
		restore_switches();
		SKIP(return, "%s", why);
	}
}

FIXTURE_TEARDOWN(threads)
{
	restore_switches();
}

/* A batch's helpers do copy: not each time, but the machine is idle. */
TEST_F_TIMEOUT(threads, helpers_help, TIMEOUT)
{
	const long old = counted("helpers_pages");

	for (int i = 1; i < MAX_MOVES; i++) {
		fill(&self->a, i, 1);
		move_all(_metadata, &self->a, i % 2);
		if (counted("helpers_pages") > old)
			break;
	}
	EXPECT_GT(counted("helpers_pages"), old);
}

FIXTURE(writers) {
	struct area a;
	struct worker w[MAX_WORKERS];
};

FIXTURE_VARIANT(writers) {
	const char *engine;
	enum memory kind;
};

FIXTURE_VARIANT_ADD(writers, off) { .engine = "off", .kind = MTHP };
FIXTURE_VARIANT_ADD(writers, threads) { .engine = "threads", .kind = MTHP };
FIXTURE_VARIANT_ADD(writers, threads_small) { .engine = "threads", .kind = SMALL };
FIXTURE_VARIANT_ADD(writers, threads_shmem) { .engine = "threads", .kind = SHMEM };
FIXTURE_VARIANT_ADD(writers, dma) { .engine = "dma", .kind = MTHP };

FIXTURE_SETUP(writers)
{
	const char *why = use_engine(variant->engine);

	if (!why)
		why = make_area(&self->a, variant->kind, GROUP);
	if (!why && nr_cpus() < 4)
		why = "needs four CPUs: two for writers, one for a helper";
	if (why) {
		restore_switches();
		SKIP(return, "%s", why);
	}
}

FIXTURE_TEARDOWN(writers)
{
	restore_switches();
}

/* Other threads write all the time. Kills mutant 62. */
TEST_F_TIMEOUT(writers, lose_nothing, TIMEOUT)
{
	struct area *a = &self->a;
	const long old = counted(pages_event(variant->engine));

	if (!start_workers(_metadata, self->w, a, &writing, 2))
		return;
	move_under(_metadata, a, self->w, 2, 30, 30);
	stop_workers(_metadata, self->w, 2);
	EXPECT_EQ(bad_page(a), -1);
	expect_engine_used(_metadata, variant->engine, old);
}

/* --- Pins that come and go ------------------------------------------------- */

/*
 * Anonymous memory that is pinned is not even unmapped. What is shared is, and only
 * its reference count says that somebody still uses it.
 */
static const struct work aio_work = {
	"aio", begin_aio, step_aio, SHMEM, 2 * MiB, "refused_refs",
};

static const struct work aio_anon_work = {
	"aio", begin_aio, step_aio, MTHP, 2 * MiB, NULL,
};

static const struct work process_vm_work = {
	"process_vm", alloc_buf, step_process_vm, SHMEM, 2 * MiB, "refused_refs",
};

static const struct work vmsplice_work = {
	"vmsplice", begin_vmsplice, step_vmsplice, SMALL, MiB, "refused_refs",
};

static const struct work longterm_work = {
	"longterm", begin_longterm, step_longterm, SHMEM, 2 * MiB, "refused_refs",
};

static const struct work readers_work = {
	"readers", alloc_buf, step_read_write, SHMEM, 2 * MiB, NULL,
};

FIXTURE(pins) {
	struct area a;
	struct worker w[MAX_WORKERS];
};

FIXTURE_VARIANT(pins) {
	const char *engine;
	const struct work *work;
};

FIXTURE_VARIANT_ADD(pins, aio_off) {
	.engine = "off", .work = &aio_work,
};

FIXTURE_VARIANT_ADD(pins, aio_anon_threads) {
	.engine = "threads", .work = &aio_anon_work,
};

FIXTURE_VARIANT_ADD(pins, aio_threads) {
	.engine = "threads", .work = &aio_work,
};

FIXTURE_VARIANT_ADD(pins, process_vm_threads) {
	.engine = "threads", .work = &process_vm_work,
};

FIXTURE_VARIANT_ADD(pins, vmsplice_threads) {
	.engine = "threads", .work = &vmsplice_work,
};

FIXTURE_VARIANT_ADD(pins, longterm_threads) {
	.engine = "threads", .work = &longterm_work,
};

FIXTURE_VARIANT_ADD(pins, readers_threads) {
	.engine = "threads", .work = &readers_work,
};

FIXTURE_VARIANT_ADD(pins, aio_dma) {
	.engine = "dma", .work = &aio_work,
};

FIXTURE_VARIANT_ADD(pins, readers_dma) {
	.engine = "dma", .work = &readers_work,
};

FIXTURE_SETUP(pins)
{
	const char *why = use_engine(variant->engine);

	if (!why)
		why = make_area(&self->a, variant->work->kind, variant->work->len);
	if (why) {
		restore_switches();
		SKIP(return, "%s", why);
	}
}

FIXTURE_TEARDOWN(pins)
{
	restore_switches();
}

/*
 * Who has a reference writes through it, and finds what he wrote in memory. Kills
 * mutant 64.
 */
TEST_F_TIMEOUT(pins, come_and_go, TIMEOUT)
{
	const struct work *work = variant->work;
	const bool on = strcmp(variant->engine, "off") && nr_cpus() > 2;
	const char *event = work->event ?: pages_event(variant->engine);
	const long old = counted(event);

	if (!start_workers(_metadata, self->w, &self->a, work, 2))
		return;
	for (int i = 0; i < 20; i++) {
		move_under(_metadata, &self->a, self->w, 2, 8, 8 * (i + 1));
		if (!on || counted(event) > old)
			break;
	}
	stop_workers(_metadata, self->w, 2);
	EXPECT_EQ(bad_page(&self->a), -1);
	if (on)
		EXPECT_GT(counted(event), old);
	if (work->kind < SHMEM)
		move_all(_metadata, &self->a, false);
	expect_nothing_isolated(_metadata);
}

/* --- Memory of other sorts ------------------------------------------------- */

FIXTURE(sorts) {
	struct area a;
	char swap[PATH_MAX];
};

FIXTURE_VARIANT(sorts) {
	const char *engine;
};

FIXTURE_VARIANT_ADD(sorts, off) { .engine = "off" };
FIXTURE_VARIANT_ADD(sorts, threads) { .engine = "threads" };
FIXTURE_VARIANT_ADD(sorts, dma) { .engine = "dma" };

FIXTURE_SETUP(sorts)
{
	const char *why = use_engine(variant->engine);

	if (!why)
		why = make_area(&self->a, SMALL, 2 * MiB);
	if (why) {
		restore_switches();
		SKIP(return, "%s", why);
	}
}

FIXTURE_TEARDOWN(sorts)
{
	if (self->swap[0]) {
		swapoff(self->swap);
		unlink(self->swap);
	}
	ksm_stop();
	restore_switches();
}

static const char *make_swap(char *path, size_t nr)
{
	const uint32_t header[] = { 1, nr - 1 };
	char *page = calloc(1, psize());
	bool good;
	int fd;

	snprintf(path, PATH_MAX, "%s/migrate_batch_copy.swap", test_dir());
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	good = page && fd >= 0;
	for (size_t i = nr; good && i--;) {
		if (!i) {
			memcpy(page + 1024, header, sizeof(header));
			memcpy(page + psize() - 10, "SWAPSPACE2", 10);
		}
		good = pwrite(fd, page, psize(), i * psize()) == psize();
	}
	good = good && !fsync(fd);
	close(fd);
	free(page);
	return good && !swapon(path, SWAP_FLAG_PREFER | 32767) ? NULL :
	       "no swap file (MIGRATE_TEST_DIR)";
}

static size_t nr_with(struct area *a, uint64_t flag)
{
	size_t nr = 0;

	find_folios(a);
	for (size_t i = 0; i < a->nr; i++)
		nr += (a->flags[i] & flag) && !(a->flags[i] & KPF_COMPOUND_TAIL);
	return nr;
}

/* Pages that have been read from the swap file are in the swap cache. */
TEST_F_TIMEOUT(sorts, swap_cache, TIMEOUT)
{
	struct area *a = &self->a;
	const char *why = make_swap(self->swap, 4 * a->nr);

	if (why)
		SKIP(return, "%s", why);
	for (int i = 1; i <= NR_MOVES; i++) {
		fill(a, i, 2);
		ASSERT_EQ(madvise(a->mem, a->nr * psize(), MADV_PAGEOUT), 0);
		force_read_pages(a->mem, a->nr, psize());
		if (!nr_with(a, KPF_SWAPCACHE_BIT))
			SKIP(return, "nothing came to be in the swap cache");
		/* Written back still, or known to readahead, perhaps: another time. */
		move(a, i % 2);
		ASSERT_EQ(bad_page(a), -1);
	}
	move_all(_metadata, a, false);
}

TEST_F_TIMEOUT(sorts, locked, TIMEOUT)
{
	const size_t len = self->a.nr * psize();

	if (mlock(self->a.mem, len))
		SKIP(return, "mlock: %s", strerror(errno));
	for (int i = 1; i <= NR_MOVES; i++) {
		fill(&self->a, i, 1);
		move_all(_metadata, &self->a, i % 2);
	}
	ASSERT_EQ(munlock(self->a.mem, len), 0);
}

/* Of each eight pages, seven are the first one. */
static bool is_merged_right(struct area *a)
{
	for (size_t i = 0; i < a->nr; i++)
		if (!mem_is(page_of(a, i), i % 8 ? 0 : i, 7, SIZE_MAX))
			return false;
	return true;
}

TEST_F_TIMEOUT(sorts, merged, TIMEOUT)
{
	struct area *a = &self->a;

	for (size_t i = 0; i < a->nr; i++)
		fill_mem(page_of(a, i), i % 8 ? 0 : i, 7);
	if (madvise(a->mem, a->nr * psize(), MADV_MERGEABLE))
		SKIP(return, "no KSM");
	for (int i = 0; i < 5 && !nr_with(a, KPF_KSM_BIT); i++)
		if (ksm_start() < 0)
			SKIP(return, "no KSM");
	put_str("/sys/kernel/mm/ksm/run", "0");
	if (!nr_with(a, KPF_KSM_BIT))
		SKIP(return, "nothing was merged");
	for (int i = 0; i < NR_MOVES; i++) {
		/* Of several addresses of a folio all but one are busy. */
		move(a, i % 2);
		ASSERT_TRUE(is_merged_right(a));
	}
	fill(a, 8, 1);
	move_all(_metadata, a, true);
}

static bool area_is_right(void *arg)
{
	return bad_page(arg) < 0;
}

/* A child has it all, too. */
TEST_F_TIMEOUT(sorts, forked, TIMEOUT)
{
	struct child child = start_child(area_is_right, area_is_right, &self->a);

	ASSERT_TRUE(child_is_ready(&child));
	for (int i = 0; i < NR_MOVES; i++)
		move_all(_metadata, &self->a, i % 2);
	EXPECT_TRUE(end_child(&child));
}

/* --- Metadata of a file system --------------------------------------------- */

#define NR_INODES	150
#define NR_STORMS	3
#define IMAGE_SIZE	(8 * MiB)

/* What the writer made of an inode last. */
struct inode {
	unsigned int gen;
	mode_t mode;
	char twin;		/* of its two names */
};

struct fs {
	struct area a;		/* the block device */
	struct worker w[NR_STORMS];
	struct inode *inodes;
	char dir[64];
	char image[PATH_MAX];
	char dev[64];
	int loop;
	bool mounted;
};

FIXTURE(metadata) {
	struct fs fs;
};

FIXTURE_VARIANT(metadata) {
	const char *engine;
	const char *features;
};

FIXTURE_VARIANT_ADD(metadata, journal_threads) {
	.engine = "threads", .features = "size=1",
};

FIXTURE_VARIANT_ADD(metadata, threads) {
	.engine = "threads", .features = "^has_journal",
};

FIXTURE_VARIANT_ADD(metadata, dma) {
	.engine = "dma", .features = "^has_journal",
};

static bool attach_loop(struct fs *fs)
{
	const int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	const int file = open(fs->image, O_RDWR | O_CLOEXEC);
	const int nr = control < 0 ? -1 : ioctl(control, LOOP_CTL_GET_FREE);
	bool good;

	snprintf(fs->dev, sizeof(fs->dev), "/dev/loop%d", nr);
	fs->loop = open(fs->dev, O_RDWR | O_CLOEXEC);
	good = file >= 0 && fs->loop >= 0 && !ioctl(fs->loop, LOOP_SET_FD, file);
	close(file);
	close(control);
	return good;
}

/* Blocks of 1 KiB: four buffer heads to a page. Without a shell, which may have its own. */
static bool run_mke2fs(const char *image, const char *features)
{
	const pid_t pid = fork();
	int status = -1;

	if (!pid) {
		const int null = open("/dev/null", O_RDWR);

		dup2(null, STDOUT_FILENO);
		dup2(null, STDERR_FILENO);
		setenv("PATH", "/usr/sbin:/sbin:/usr/bin:/bin", 1);
		execlp("mke2fs", "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024",
		       "-N", "2048", features[0] == '^' ? "-O" : "-J", features,
		       image, NULL);
		_exit(127);
	}
	return waitpid(pid, &status, 0) == pid && !status;
}

static const char *make_fs(struct fs *fs, const char *features)
{
	int fd;

	fs->loop = -1;
	snprintf(fs->image, sizeof(fs->image), "%s/migrate_batch_copy.img",
		 test_dir());
	snprintf(fs->dir, sizeof(fs->dir), "/tmp/migrate_batch_copy_XXXXXX");
	fd = open(fs->image, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || ftruncate(fd, IMAGE_SIZE) || close(fd))
		return "no file for an image (MIGRATE_TEST_DIR)";
	if (!run_mke2fs(fs->image, features))
		return "no mke2fs";
	if (!attach_loop(fs))
		return "no loop device";
	return mkdtemp(fs->dir) ? NULL : "no directory to mount on";
}

static bool mount_fs(struct fs *fs)
{
	fs->mounted = !mount(fs->dev, fs->dir, "ext4", 0, NULL);
	return fs->mounted;
}

static bool unmount_fs(struct fs *fs)
{
	fs->mounted = umount(fs->dir);
	return !fs->mounted;
}

/* The page cache of the device: nothing but metadata has buffer heads there. */
static const char *map_device(struct area *a, const char *dev)
{
	if (!two_nodes(a->node))
		return "needs two nodes with memory";
	a->kind = FILE_DIRTY;
	a->nr = IMAGE_SIZE / psize();
	a->fd = open(dev, O_RDONLY | O_CLOEXEC);
	a->mem = mmap(NULL, IMAGE_SIZE, PROT_READ, MAP_SHARED, a->fd, 0);
	if (a->mem == MAP_FAILED || !alloc_tables(a))
		return "the device can not be mapped";
	/* All of it now, and no readahead that makes large folios later. */
	madvise(a->mem, IMAGE_SIZE, MADV_RANDOM);
	return madvise(a->mem, IMAGE_SIZE, MADV_POPULATE_READ) ?
	       "the device can not be read" : NULL;
}

static void drop_fs(struct fs *fs)
{
	if (fs->mounted)
		umount2(fs->dir, MNT_DETACH);
	if (fs->loop > 0) {
		ioctl(fs->loop, LOOP_CLR_FD, 0);
		close(fs->loop);
	}
	if (fs->image[0])
		unlink(fs->image);
	if (fs->dir[0])
		rmdir(fs->dir);
}

FIXTURE_SETUP(metadata)
{
	const char *why = use_engine(variant->engine);
	struct fs *fs = &self->fs;

	if (!why)
		why = make_fs(fs, variant->features);
	if (!why && !mount_fs(fs))
		why = "no ext4";
	if (!why)
		why = map_device(&fs->a, fs->dev);
	fs->inodes = calloc(NR_INODES, sizeof(*fs->inodes));
	if (why) {
		drop_fs(fs);
		restore_switches();
		SKIP(return, "%s", why);
	}
}

FIXTURE_TEARDOWN(metadata)
{
	drop_fs(&self->fs);
	restore_switches();
}

static void name_inode(const char *dir, int nr, char twin, char *path)
{
	sprintf(path, "%s/f%d.%c", dir, nr, twin);
}

static bool create_inode(const char *path, int nr, unsigned int gen)
{
	const uint64_t data[2] = { pattern(nr, gen), gen };
	const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	bool good;

	if (fd < 0)
		return false;
	good = write(fd, data, sizeof(data)) == sizeof(data);
	return !close(fd) && good;
}

/* One more generation of it. */
static bool change_inode(const char *dir, struct inode *inode, int nr)
{
	const unsigned int gen = inode->gen + 1;
	struct timespec times[2] = { { gen, 0 }, { gen, nr } };
	char path[128], other[128];

	name_inode(dir, nr, inode->twin, path);
	if (gen % 8 == 1 && (unlink(path), !create_inode(path, nr, gen)))
		return false;
	if ((gen + nr) % 16 == 0) {
		inode->twin ^= 'a' ^ 'b';
		name_inode(dir, nr, inode->twin, other);
		if (rename(path, other))
			return false;
		strcpy(path, other);
	}
	inode->gen = gen;
	inode->mode = 0400 | (gen * 7 + nr) % 0400;
	return !chmod(path, inode->mode) && !utimensat(AT_FDCWD, path, times, 0);
}

static bool inode_is_right(const char *dir, const struct inode *inode, int nr)
{
	const unsigned int gen = inode->gen - (inode->gen - 1) % 8;
	uint64_t data[2] = {};
	char path[128];
	struct stat stat;
	int fd;

	name_inode(dir, nr, inode->twin ^ 'a' ^ 'b', path);
	if (!access(path, F_OK))
		return false;
	name_inode(dir, nr, inode->twin, path);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &stat) ||
	    read(fd, data, sizeof(data)) != sizeof(data))
		return false;
	close(fd);
	return (stat.st_mode & 07777) == inode->mode &&
	       stat.st_mtim.tv_sec == inode->gen && stat.st_mtim.tv_nsec == nr &&
	       stat.st_size == sizeof(data) && stat.st_nlink == 1 &&
	       data[0] == pattern(nr, gen) && data[1] == gen;
}

/* All inodes of the worker once, and to the disk now and then. */
static bool step_storm(struct worker *w)
{
	struct fs *fs = (void *)w->buf;
	const int storm = w - fs->w;
	int fd;

	for (int i = storm; i < NR_INODES; i += NR_STORMS)
		if (!change_inode(fs->dir, &fs->inodes[i], i))
			return false;
	if (storm || w->steps % 4)
		return true;
	fd = open(fs->dir, O_RDONLY | O_CLOEXEC);
	return fd >= 0 && !syncfs(fd) && !close(fd);
}

static const struct work storm_work = { "storm", NULL, step_storm };

/* Forget all, and see what is on the disk. */
static void expect_metadata(struct __test_metadata *_metadata,
			    struct fs *fs)
{
	int nr_bad = 0;

	ASSERT_EQ(munmap(fs->a.mem, IMAGE_SIZE), 0);
	close(fs->a.fd);
	ASSERT_TRUE(unmount_fs(fs));
	ASSERT_TRUE(put_str("/proc/sys/vm/drop_caches", "3"));
	ASSERT_TRUE(mount_fs(fs));
	for (int i = 0; i < NR_INODES; i++)
		nr_bad += !inode_is_right(fs->dir, &fs->inodes[i], i);
	EXPECT_EQ(nr_bad, 0);
	ASSERT_TRUE(unmount_fs(fs));
}

/*
 * Inodes are changed, by their buffer heads alone, while the pages that they are in
 * go to and fro. Kills mutant 61, if it lets the mapping of a device pass, too.
 */
TEST_F_TIMEOUT(metadata, storm, TIMEOUT)
{
	struct fs *fs = &self->fs;
	struct area *a = &fs->a;
	const long old = counted("refused_private") + counted("refused_mapping");
	const long moved = read_named("/proc/vmstat", "pgmigrate_success");

	for (int i = 0; i < NR_INODES; i++)
		fs->inodes[i].twin = 'a';
	put_in(SWITCHES, "reasons", "all");
	for (int i = 0; i < NR_STORMS; i++) {
		fs->w[i].buf = (void *)fs;
		if (!start_worker(_metadata, &fs->w[i], a, &storm_work, i, NR_STORMS))
			return;
	}
	for (int i = 0; i < MAX_MOVES; i++) {
		force_read_pages(a->mem, a->nr, psize());
		move(a, false);
		if (i == 6)
			put_str("/proc/sys/vm/compact_memory", "1");
		if (i >= 12 && worked(fs->w, NR_STORMS, 4))
			break;
	}
	EXPECT_TRUE(worked(fs->w, NR_STORMS, 4));
	stop_workers(_metadata, fs->w, NR_STORMS);
	EXPECT_GT(read_named("/proc/vmstat", "pgmigrate_success"), moved);
	if (strcmp(variant->engine, "off"))
		EXPECT_GT(counted("refused_private") + counted("refused_mapping"), old);
	expect_metadata(_metadata, fs);
}

/* --- Others that interfere -------------------------------------------------- */

/* Each step is another state of all the switches. */
static bool step_switches(struct worker *w)
{
	static const char * const reasons[] = {
		"all", "syscall_or_cpuset", "none", "mempolicy_mbind damon",
	};
	const unsigned int i = w->steps;

	return put_in(SWITCHES, "engine", i % 3 ? "threads" : "off") &&
	       put_in(SWITCHES, "reasons", reasons[i / 2 % ARRAY_SIZE(reasons)]) &&
	       put_num(SWITCHES, "max_helpers", i % 5) &&
	       (put_num(SWITCHES, "bulk", i % 2) || errno == EOPNOTSUPP);
}

static bool set_online(int cpu, bool on)
{
	char path[128];

	snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/online", cpu);
	return put_str(path, on ? "1" : "0");
}

static void all_online(void)
{
	for (int cpu = 1; cpu < sysconf(_SC_NPROCESSORS_CONF); cpu++)
		set_online(cpu, true);
}

/* All but one, one after the other. */
static bool step_hotplug(struct worker *w)
{
	const int cpu = 1 + w->steps % (sysconf(_SC_NPROCESSORS_CONF) - 1);

	return set_online(cpu, false) && set_online(cpu, true);
}

static const char *begin_hotplug(struct worker *w)
{
	return sysconf(_SC_NPROCESSORS_CONF) < 2 || !set_online(1, true) ?
	       "no CPU that can be taken away" : NULL;
}

#define CHURN	(48 * MiB)

static size_t free_of(int node)
{
	char path[96], line[128];
	size_t kib = 0;
	FILE *file;

	snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/meminfo", node);
	file = fopen(path, "r");
	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "Node %*d MemFree: %zu", &kib) == 1)
			break;
	if (file)
		fclose(file);
	return kib << 10;
}

/* Have most of a node; it is there until the process ends. */
static bool fill_node(int node)
{
	const size_t left = (read_num("/proc/sys/vm/min_free_kbytes") << 10) +
			    CHURN + 4 * GROUP;
	const size_t len = free_of(node) - left;
	char *mem;
	int ret;

	if (free_of(node) < left + MiB)
		return true;
	mem = mmap(NULL, len, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (mem == MAP_FAILED || mbind_node(mem, len, node, 0))
		return false;
	allow_only(2 * MiB);
	madvise(mem, len, MADV_HUGEPAGE);
	ret = madvise(mem, len, MADV_POPULATE_WRITE);
	allow_only(0);
	return !ret;
}

static const char *begin_pressure(struct worker *w)
{
	arm("batch", 3, -1);
	for (int i = 0; i < 2; i++)
		if (free_of(w->a->node[i]) > (3UL << 30))
			return "too much memory to have all of it";
	for (int i = 0; i < 2; i++)
		if (!fill_node(w->a->node[i]))
			return "memory could not be filled";
	return NULL;
}

/* Take what the next move might need, and give it back. */
static bool step_pressure(struct worker *w)
{
	const unsigned long mask = 1UL << w->a->node[w->steps % 2];
	char *mem = mmap(NULL, CHURN, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (mem == MAP_FAILED ||
	    syscall(__NR_mbind, mem, CHURN, MPOL_PREFERRED, &mask, 64, 0) ||
	    madvise(mem, CHURN, MADV_POPULATE_WRITE))
		return false;
	munmap(mem, CHURN);
	return put_in(SWITCHES, "engine", w->steps % 4 ? "threads" : "off");
}

/* The device's driver is taken away and brought back. */
static bool step_unbind(struct worker *w)
{
	/* Without a channel, the engine is switched off */
	return put_in(DMA_DRIVER, "unbind", DMA_DEVICE) &&
	       put_in(DMA_DRIVER, "bind", DMA_DEVICE) &&
	       put_in(SWITCHES, "engine", "dma");
}

FIXTURE(meddlers) {
	struct area a;
	struct worker w[MAX_WORKERS];
};

FIXTURE_VARIANT(meddlers) {
	const char *engine;
	struct work work;
	unsigned int steps;
};

FIXTURE_VARIANT_ADD(meddlers, switches) {
	.engine = "threads", .work = { "switches", NULL, step_switches }, .steps = 40,
};

FIXTURE_VARIANT_ADD(meddlers, hotplug) {
	.engine = "threads", .work = { "hotplug", begin_hotplug, step_hotplug },
	.steps = 6,
};

FIXTURE_VARIANT_ADD(meddlers, pressure) {
	.engine = "threads", .work = { "pressure", begin_pressure, step_pressure },
	.steps = 4,
};

FIXTURE_VARIANT_ADD(meddlers, unbind) {
	.engine = "dma", .work = { "unbind", NULL, step_unbind }, .steps = 10,
};

FIXTURE_SETUP(meddlers)
{
	const char *why = use_engine(variant->engine);

	if (!why)
		why = make_area(&self->a, MIXED, 2 * GROUP);
	if (why) {
		restore_switches();
		SKIP(return, "%s", why);
	}
}

FIXTURE_TEARDOWN(meddlers)
{
	all_online();
	if (!strcmp(variant->engine, "dma"))
		put_in(DMA_DRIVER, "bind", DMA_DEVICE);
	restore_switches();
}

/* Engines, CPUs and memory come and go, and two threads write. */
TEST_F_TIMEOUT(meddlers, lose_nothing, TIMEOUT)
{
	struct area *a = &self->a;

	if (!start_worker(_metadata, &self->w[2], a, &variant->work, 0, 1) ||
	    !start_workers(_metadata, self->w, a, &writing, 2))
		return;
	move_under(_metadata, a, self->w + 2, 1, 8, variant->steps);
	ASSERT_TRUE(worked(self->w, 2, 1));
	stop_workers(_metadata, self->w, 3);
	EXPECT_EQ(bad_page(a), -1);
	expect_nothing_isolated(_metadata);
	if (!strcmp(variant->engine, "dma")) {
		const long pages = counted("dma_pages");

		move_all(_metadata, a, false);
		EXPECT_GT(counted("dma_pages"), pages);
	}
}

/* --- Whose time it is -------------------------------------------------------- */

#define CGROUPS		"/sys/fs/cgroup/"
#define OUTER		CGROUPS "migrate_batch_copy/"
#define INNER		OUTER "inner/"

FIXTURE(cgroup) {
	struct area a;
	bool enabled;		/* the controller, by us */
};

FIXTURE_VARIANT(cgroup) {
	const char *limited;	/* directory of the one that is */
};

FIXTURE_VARIANT_ADD(cgroup, free) { .limited = NULL };
FIXTURE_VARIANT_ADD(cgroup, limited) { .limited = INNER };
FIXTURE_VARIANT_ADD(cgroup, limited_above) { .limited = OUTER };

/* This process in the inner one of two cgroups. */
static const char *make_cgroups(bool *enabled)
{
	char controllers[256] = "";

	if (access(CGROUPS "cgroup.controllers", F_OK))
		mount("none", CGROUPS, "cgroup2", 0, NULL);
	if (!get_str(CGROUPS, "cgroup.controllers", controllers, sizeof(controllers)) ||
	    !strstr(controllers, "cpu"))
		return "no cgroup2 with a CPU controller";
	controllers[0] = '\0';
	get_str(CGROUPS, "cgroup.subtree_control", controllers, sizeof(controllers));
	*enabled = !strstr(controllers, "cpu ") && !strstr(controllers, "cpu\n");
	if (!put_in(CGROUPS, "cgroup.subtree_control", "+cpu") ||
	    (mkdir(OUTER, 0755) && errno != EEXIST) ||
	    !put_in(OUTER, "cgroup.subtree_control", "+cpu") ||
	    (mkdir(INNER, 0755) && errno != EEXIST) ||
	    !put_in(INNER, "cgroup.procs", "0"))
		return "no cgroups can be made";
	return NULL;
}

static void leave_cgroups(bool enabled)
{
	if (access(INNER, F_OK))
		return;
	put_in(CGROUPS, "cgroup.procs", "0");
	rmdir(INNER);
	rmdir(OUTER);
	if (enabled)
		put_in(CGROUPS, "cgroup.subtree_control", "-cpu");
}

FIXTURE_SETUP(cgroup)
{
	const char *why = use_engine("threads");

	if (!why && nr_cpus() < 2)
		why = "needs two CPUs";
	if (!why)
		why = make_area(&self->a, THP, 2 * GROUP);
	if (!why)
		why = make_cgroups(&self->enabled);
	/* As much as it can have: it is not slowed down by that. */
	if (!why && variant->limited &&
	    !put_in(variant->limited, "cpu.max", "1000000 100000"))
		why = "no cpu.max";
	if (why) {
		leave_cgroups(self->enabled);
		restore_switches();
		SKIP(return, "%s", why);
	}
}

FIXTURE_TEARDOWN(cgroup)
{
	leave_cgroups(self->enabled);
	restore_switches();
}

/* No helper helps a task whose time is limited, in itself or above. */
TEST_F_TIMEOUT(cgroup, limit, TIMEOUT)
{
	const long helpers = counted_for_good("helpers");
	const long refused = counted("refused_quota");

	for (int i = 1; i <= 10; i++) {
		fill(&self->a, i, 1);
		move_all(_metadata, &self->a, i % 2);
	}
	if (variant->limited) {
		EXPECT_GE(counted("refused_quota"), refused + 10);
		EXPECT_EQ(counted_for_good("helpers"), helpers);
	} else {
		EXPECT_EQ(counted("refused_quota"), refused);
	}
}

struct usage {
	long long cgroup, own;	/* microseconds */
	long pages;		/* that helpers copied */
};

/* What has run is accounted for when it stops: have that before looking. */
static struct usage usage_now(void)
{
	struct usage usage = { .pages = counted_for_good("helpers_pages") };
	struct timespec own;

	usage.cgroup = read_named(INNER "cpu.stat", "usage_usec");
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own);
	usage.own = own.tv_sec * 1000000LL + own.tv_nsec / 1000;
	return usage;
}

/* What it takes to move the area often, and the helpers' part of that. */
static struct usage usage_of_moves(struct area *a)
{
	const struct usage old = usage_now();
	struct usage new;

	/* More often than what else is charged, or not yet, could hide */
	for (int i = 0; i < 32; i++)
		move(a, i % 2);
	new = usage_now();
	return (struct usage) {
		new.cgroup - old.cgroup, new.own - old.own, new.pages - old.pages,
	};
}

/* Helpers' time is the cgroup's. Kills mutant 118. */
TEST_F_TIMEOUT(cgroup, charge, TIMEOUT)
{
	struct usage with, without;
	long long extra, others;

	if (variant->limited)
		SKIP(return, "there are no helpers");
	move_all(_metadata, &self->a, false);
	with = usage_of_moves(&self->a);
	ASSERT_TRUE(put_num(SWITCHES, "max_helpers", 0));
	without = usage_of_moves(&self->a);
	ASSERT_EQ(bad_page(&self->a), -1);

	extra = with.cgroup - with.own;
	others = without.cgroup - without.own;
	if (!with.pages)
		SKIP(return, "no helper came in time");
	EXPECT_EQ(without.pages, 0);
	EXPECT_LT(llabs(others), without.own / 10 + 2000);
	/* No CPU copies 64 GB a second, nor takes longer than who migrates does. */
	EXPECT_GT(extra - others, with.pages * (long)psize() / 64000);
	TH_LOG("cgroup %lld us, own %lld us, helpers %ld pages; without %lld us, %lld us",
	       with.cgroup, with.own, with.pages, without.cgroup, without.own);
	EXPECT_LT(extra, 10 * (with.own + without.own));
}

/* --- Where helpers run ------------------------------------------------------- */

struct event {
	int cpu, cache;
	unsigned long nr_pages;
};

struct traced {
	struct area a;
	struct event events[MAX_CPUS];
	char cpumask[256];
	pid_t spinners[MAX_CPUS];
	unsigned int *spun;	/* shared with them */
};

FIXTURE(where) {
	struct traced t;
};

static void stop_tracing(void)
{
	put_in(TRACING, "events/migrate/migrate_copy_helper/enable", "0");
	rmdir(TRACING);
}

FIXTURE_SETUP(where)
{
	const char *why = use_engine("threads");

	if (!why && (nr_cpus() < 2 || nr_cpus() > MAX_CPUS))
		why = "needs some CPUs";
	if (!why)
		why = make_area(&self->t.a, THP, 2 * MiB);
	if (!why && ((mkdir(TRACING, 0755) && errno != EEXIST) ||
		     !put_in(TRACING, "events/migrate/migrate_copy_helper/enable", "1")))
		why = "no tracefs, or no event migrate_copy_helper";
	if (why) {
		stop_tracing();
		restore_switches();
		SKIP(return, "%s", why);
	}
}

FIXTURE_TEARDOWN(where)
{
	for (int i = 0; i < MAX_CPUS; i++)
		if (self->t.spinners[i] > 0)
			kill(self->t.spinners[i], SIGKILL);
	stop_tracing();
	if (self->t.cpumask[0])
		put_str(WQ_CPUMASK, self->t.cpumask);
	restore_switches();
}

/* How many helpers the last batch had. */
static int read_events(struct traced *t)
{
	FILE *file = fopen(TRACING "trace", "r");
	char line[512];
	int nr = 0;

	while (file && nr < MAX_CPUS && fgets(line, sizeof(line), file)) {
		const char *at = strstr(line, "migrate_copy_helper: ");
		struct event *e = &t->events[nr];

		if (at && sscanf(at, "migrate_copy_helper: cpu=%d cache=%d nr_pages=%lu",
				 &e->cpu, &e->cache, &e->nr_pages) == 3)
			nr++;
	}
	if (file)
		fclose(file);
	return nr;
}

/* One batch; returns how many helpers it had. */
static int move_and_trace(struct __test_metadata *_metadata,
			  struct traced *t)
{
	close(open(TRACING "trace", O_WRONLY | O_TRUNC));
	move_all(_metadata, &t->a, false);
	counted_for_good("helpers");
	return read_events(t);
}

/* The first CPU that shares the last-level cache of @cpu. */
static int cache_of(int cpu)
{
	char name[128], buf[256];

	for (int index = 9; index >= 0; index--) {
		snprintf(name, sizeof(name), "cpu%d/cache/index%d/shared_cpu_list",
			 cpu, index);
		if (get_str("/sys/devices/system/cpu/", name, buf, sizeof(buf)))
			return strtol(buf, NULL, 10);
	}
	return -1;
}

static int nr_caches(void)
{
	int nr = 0;

	for (int cpu = 0; cpu < nr_cpus(); cpu++)
		nr += cache_of(cpu) == cpu;
	return nr;
}

/*
 * No two helpers of a batch share a last-level cache, and other caches than that of
 * who migrates are used.
 */
TEST_F_TIMEOUT(where, caches, TIMEOUT)
{
	const int max = nr_caches();
	uint64_t seen = 0;

	for (int i = 0; i < 20; i++) {
		const int nr = move_and_trace(_metadata, &self->t);

		if (max)
			EXPECT_LE(nr, max);
		for (int j = 0; j < nr; j++) {
			seen |= 1ULL << self->t.events[j].cache;
			for (int k = 0; k < j; k++)
				EXPECT_NE(self->t.events[j].cache,
					  self->t.events[k].cache);
			if (max)
				EXPECT_EQ(cache_of(self->t.events[j].cpu),
					  cache_of(self->t.events[j].cache));
		}
	}
	EXPECT_NE(seen, 0);
	if (max > 1)
		EXPECT_GT(__builtin_popcountll(seen), 1);
}

/* The first CPU, and one as far from it as can be. */
static int far_cpu(void)
{
	for (int cpu = nr_cpus() - 1; cpu > 0; cpu--)
		if (cache_of(cpu) == cpu)
			return cpu;
	return nr_cpus() - 1;
}

static bool run_on(const cpu_set_t *set)
{
	return !sched_setaffinity(0, sizeof(*set), set);
}

static bool run_on_cpu(int cpu)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	return run_on(&one);
}

/* The two CPUs that helpers are restricted to. */
static void two_cpus(cpu_set_t *set)
{
	CPU_ZERO(set);
	CPU_SET(0, set);
	CPU_SET(far_cpu(), set);
}

/* Helpers must run on CPUs in @allowed. */
static void expect_helpers_on(struct __test_metadata *_metadata,
			      struct traced *t, const cpu_set_t *allowed,
			      int nr_moves)
{
	int sum = 0, nr_bad = 0;

	for (int i = 0; i < nr_moves; i++) {
		const int nr = move_and_trace(_metadata, t);

		for (int j = 0; j < nr; j++) {
			if (CPU_ISSET(t->events[j].cpu, allowed))
				continue;
			if (!nr_bad++)
				TH_LOG("one ran on CPU %d", t->events[j].cpu);
		}
		sum += nr;
	}
	EXPECT_GT(sum, 0);
	EXPECT_EQ(nr_bad, 0) {
		TH_LOG("%d of %d helpers ran on other CPUs", nr_bad, sum);
	}
}

/*
 * Helpers are asked for where a task may run itself. A worker may be woken on
 * another CPU of the same cache, but not of another one.
 */
TEST_F_TIMEOUT(where, affinity, TIMEOUT)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	for (int cpu = 0; cpu < nr_cpus(); cpu++)
		if (cache_of(cpu) == cache_of(0))
			CPU_SET(cpu, &set);
	if (CPU_COUNT(&set) < 2 || CPU_COUNT(&set) == nr_cpus())
		SKIP(return, "needs two caches, with two CPUs each");
	ASSERT_TRUE(run_on(&set));
	expect_helpers_on(_metadata, &self->t, &set, 30);
}

TEST_F_TIMEOUT(where, workqueue_cpumask, TIMEOUT)
{
	char mask[32];
	cpu_set_t set;

	if (far_cpu() > 31)
		SKIP(return, "too many CPUs");
	two_cpus(&set);
	ASSERT_TRUE(get_str("", WQ_CPUMASK, self->t.cpumask, sizeof(self->t.cpumask)));
	snprintf(mask, sizeof(mask), "%x", 1U | 1U << far_cpu());
	ASSERT_TRUE(put_str(WQ_CPUMASK, mask));
	expect_helpers_on(_metadata, &self->t, &set, 20);
}

static void spin(int cpu, unsigned int *spun)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	run_on_cpu(cpu);
	for (;;)
		__atomic_fetch_add(spun, 1, __ATOMIC_RELAXED);
}

/* Each CPU has something to do, and does it. */
static void keep_cpus_busy(struct __test_metadata *_metadata,
			   struct traced *t)
{
	t->spun = mmap(NULL, MAX_CPUS * sizeof(*t->spun), PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(t->spun, MAP_FAILED);
	for (int cpu = 0; cpu < nr_cpus(); cpu++) {
		t->spinners[cpu] = fork();
		ASSERT_GE(t->spinners[cpu], 0);
		if (!t->spinners[cpu])
			spin(cpu, &t->spun[cpu]);
	}
	for (int cpu = 0; cpu < nr_cpus(); cpu++)
		while (READ_ONCE(t->spun[cpu]) < 1000)
			sched_yield();
}

/* A busy CPU is left alone. */
TEST_F_TIMEOUT(where, busy, TIMEOUT)
{
	long helpers, refused, copied;

	keep_cpus_busy(_metadata, &self->t);
	helpers = counted_for_good("helpers");
	refused = counted("refused_busy");
	copied = counted("threads");
	for (int i = 1; i <= 10; i++) {
		fill(&self->t.a, i, 1);
		move_all(_metadata, &self->t.a, i % 2);
	}
	EXPECT_GT(counted("refused_busy"), refused);
	EXPECT_EQ(counted("threads"), copied);
	EXPECT_EQ(counted_for_good("helpers"), helpers);
}

/* --- Faults ------------------------------------------------------------------ */

FIXTURE(faults) {
	struct area a;
};

FIXTURE_VARIANT(faults) {
	const char *engine;
	const char *bulk;
};

FIXTURE_VARIANT_ADD(faults, off) { .engine = "off", .bulk = "0" };
FIXTURE_VARIANT_ADD(faults, off_bulk) { .engine = "off", .bulk = "1" };
FIXTURE_VARIANT_ADD(faults, threads) { .engine = "threads", .bulk = "0" };
FIXTURE_VARIANT_ADD(faults, threads_bulk) { .engine = "threads", .bulk = "1" };

FIXTURE_SETUP(faults)
{
	const char *why = use_engine(variant->engine);

	if (!why && !put_in(SWITCHES, "bulk", variant->bulk))
		why = "no way to copy in bulk";
	if (!why && access(FAULTS, F_OK))
		why = "no fault injection (CONFIG_MIGRATION_BATCH_COPY_FAULTS)";
	if (!why)
		why = make_area(&self->a, MIXED, 2 * GROUP);
	if (why) {
		restore_switches();
		SKIP(return, "%s", why);
	}
}

FIXTURE_TEARDOWN(faults)
{
	restore_switches();
}

/* Of the folios that stay where they were; their pages are added up. */
static size_t nr_staying(struct area *a, size_t *nr_pages)
{
	size_t nr = 0;

	find_folios(a);
	*nr_pages = nr_elsewhere(a);
	for (size_t i = 0; i < a->nr; i++)
		nr += a->status[i] != a->node[a->at] &&
		      !(a->flags[i] & KPF_COMPOUND_TAIL);
	return nr;
}

/* Nothing can be read. All stays as it was, nothing is leaked, and moves later. */
TEST_F_TIMEOUT(faults, all_poisoned, TIMEOUT)
{
	struct area *a = &self->a;
	size_t nr_pages;

	for (int i = 0; i < 4; i++) {
		const long poisoned = counted("poisoned");

		ASSERT_TRUE(arm("poison", 1, -1));
		EXPECT_EQ(move(a, i % 2), i % 2 ? -EIO : (long)a->nr_folios);
		ASSERT_TRUE(arm("poison", 1, 0));
		EXPECT_EQ(nr_staying(a, &nr_pages), a->nr_folios);
		EXPECT_EQ(nr_pages, a->nr);
		EXPECT_EQ(bad_page(a), -1);
		if (!strcmp(variant->engine, "off"))
			EXPECT_EQ(counted("poisoned"), poisoned);
		expect_nothing_isolated(_metadata);
		EXPECT_EQ(move_pages_to(a, a->node[a->at]), 0);
		EXPECT_EQ(nr_elsewhere(a), 0);
		fill(a, i, 1);
	}
}

/* The fault's count of those who asked is a multiple of @interval afterwards. */
static bool calibrate(struct area *a, long interval)
{
	struct area one = *a;

	one.nr = 1;
	if (!arm("poison", interval, 1))
		return false;
	for (long i = 0; i < 2 * interval; i++) {
		move(&one, false);
		if (!get_num(FAULTS, "poison/times"))
			break;
	}
	return !get_num(FAULTS, "poison/times") && !move_pages_to(a, a->node[a->at]);
}

/* If a page is tried once more for another reason, they are not the same: again. */
static long poison_one(struct area *a, bool by_mbind)
{
	long ret = 0;

	for (int attempt = 0; attempt < 5 && !ret; attempt++) {
		if (!calibrate(a, 65) || !arm("poison", 65, 2))
			break;
		ret = move(a, by_mbind);
	}
	return ret;
}

/*
 * One page can not be read: it stays, and nothing else does. All are tried once
 * together, and then by themselves those that failed, after as many pages as there
 * are: both times it is the middle one that fails.
 */
TEST_F_TIMEOUT(faults, one_poisoned, TIMEOUT)
{
	struct area a = {};
	const char *why = make_area(&a, SMALL, 129 * psize());
	size_t nr_pages;

	if (why)
		SKIP(return, "%s", why);
	for (int i = 0; i < 2; i++) {
		const long failed = read_named("/proc/vmstat", "pgmigrate_fail");
		const long poisoned = counted("poisoned");

		fill(&a, i, 1);
		EXPECT_EQ(poison_one(&a, i % 2), i % 2 ? -EIO : 1);
		/* It did not make the rest of its batch fail: one for each attempt */
		EXPECT_LT(counted("poisoned") - poisoned, 10);
		EXPECT_EQ(get_num(FAULTS, "poison/times"), 0);
		EXPECT_EQ(nr_staying(&a, &nr_pages), 1);
		EXPECT_EQ(read_named("/proc/vmstat", "pgmigrate_fail"), failed + 1);
		EXPECT_EQ(bad_page(&a), -1);
		expect_nothing_isolated(_metadata);
		EXPECT_EQ(move_pages_to(&a, a.node[a.at]), 0);
		EXPECT_EQ(nr_elsewhere(&a), 0);
		ASSERT_EQ(bad_page(&a), -1);
	}
}

/* Each third folio is copied by who migrates. */
TEST_F_TIMEOUT(faults, folio, TIMEOUT)
{
	const long fellback = counted("fellback");

	if (!strcmp(variant->engine, "off") || nr_cpus() < 2)
		SKIP(return, "nothing is copied by an engine");
	ASSERT_TRUE(arm("folio", 3, -1));
	for (int i = 1; i <= 4; i++) {
		fill(&self->a, i, 1);
		move_all(_metadata, &self->a, i % 2);
	}
	EXPECT_GT(counted("fellback"), fellback);
	expect_nothing_isolated(_metadata);
}

/*
 * What has been copied can never be moved, as long as it is migrated in batches.
 * Then it is copied once more, by who migrates, to another folio. Kills mutant 63.
 */
TEST_F_TIMEOUT(faults, again, TIMEOUT)
{
	const long wasted = counted("wasted");
	struct area small = {};

	if (!strcmp(variant->engine, "off") || nr_cpus() < 2)
		SKIP(return, "nothing is copied by an engine");
	ASSERT_EQ(make_area(&small, SMALL, GROUP), NULL);
	ASSERT_TRUE(arm("again", 1, -1));
	for (int i = 1; i <= 4; i++) {
		fill(&small, i, 1);
		move_all(_metadata, &small, i % 2);
	}
	EXPECT_GT(counted("wasted"), wasted);
	expect_nothing_isolated(_metadata);
}

/* One folio, no more. */
TEST_F_TIMEOUT(faults, one_folio, TIMEOUT)
{
	const long fellback = counted("fellback");

	if (!strcmp(variant->engine, "off") || nr_cpus() < 2)
		SKIP(return, "nothing is copied by an engine");
	ASSERT_TRUE(arm("folio", 7, 1));
	for (int i = 1; i <= MAX_MOVES && counted("fellback") == fellback; i++)
		move_all(_metadata, &self->a, i % 2);
	move_all(_metadata, &self->a, true);
	EXPECT_EQ(counted("fellback"), fellback + 1);
}

/* Who migrates copies all by himself if no helper can be had. */
TEST_F_TIMEOUT(faults, helper, TIMEOUT)
{
	const long helpers = counted_for_good("helpers");

	ASSERT_TRUE(arm("helper", 1, -1));
	for (int i = 1; i <= 4; i++) {
		fill(&self->a, i, 1);
		move_all(_metadata, &self->a, i % 2);
	}
	EXPECT_EQ(counted_for_good("helpers"), helpers);
}

TEST_F_TIMEOUT(faults, batch, TIMEOUT)
{
	const bool on = strcmp(variant->engine, "off");
	const long copied = counted("threads"), refused = counted("refused_busy");

	ASSERT_TRUE(arm("batch", 1, -1));
	for (int i = 1; i <= 4; i++) {
		fill(&self->a, i, 1);
		move_all(_metadata, &self->a, i % 2);
	}
	EXPECT_EQ(counted("threads"), copied);
	if (on)
		EXPECT_GT(counted("refused_busy"), refused);
}

/* --- A device that fails ----------------------------------------------------- */

#define QUARANTINE	(8 * MiB)

FIXTURE(dma) {
	struct area a;
	long lost;		/* quarantined for good, by earlier tests */
};

FIXTURE_SETUP(dma)
{
	const char *why = use_engine("dma");

	self->lost = get_num(SWITCHES, "dma_quarantined");
	if (!why)
		why = make_area(&self->a, MIXED, GROUP);
	if (why) {
		restore_switches();
		SKIP(return, "%s", why);
	}
}

static bool use_mode(const char *mode, long nth)
{
	return put_num(DMA_TEST, "nth", nth) && put_in(DMA_TEST, "mode", mode);
}

/* What hangs comes to its end, late: until no more than @lost bytes are held. */
static long quarantined_after_release(long lost)
{
	long left = -1;

	use_mode("ok", 0);
	for (int i = 0; i < 500 && left != lost; i++) {
		put_num(DMA_TEST, "release", 1);
		usleep(10000);
		left = get_num(SWITCHES, "dma_quarantined");
	}
	return left;
}

FIXTURE_TEARDOWN(dma)
{
	EXPECT_EQ(quarantined_after_release(self->lost), self->lost);
	restore_switches();
}

struct mode {
	const char *name;
	long nth;
	const char *event;	/* must rise */
};

static void move_in_mode(struct __test_metadata *_metadata, struct area *a,
			 const struct mode *mode)
{
	const long old = counted(mode->event);

	/* Channels that timed out before come back by that. */
	ASSERT_TRUE(put_in(SWITCHES, "engine", "dma"));
	ASSERT_TRUE(use_mode(mode->name, mode->nth));
	if (!strcmp(mode->name, "lost"))
		put_num(SWITCHES, "dma_timeout_ms", 100);
	for (int i = 1; i <= 4; i++) {
		fill(a, i, 1);
		move_all(_metadata, a, i % 2);
	}
	EXPECT_GT(counted(mode->event), old) {
		TH_LOG("%s of mode %s", mode->event, mode->name);
	}
}

TEST_F_TIMEOUT(dma, modes, TIMEOUT)
{
	static const struct mode modes[] = {
		{ "ok", 0, "dma_pages" }, { "reverse", 0, "dma_pages" },
		{ "slow", 3, "dma_pages" }, { "error", 0, "fellback" },
		{ "error", 3, "fellback" }, { "error", 3, "dma_pages" },
		{ "lost", 40, "dma_timeouts" }, { "lost", 40, "fellback" },
	};

	for (size_t i = 0; i < ARRAY_SIZE(modes); i++)
		move_in_mode(_metadata, &self->a, &modes[i]);
	EXPECT_GT(get_num(DMA_TEST, "descriptors"), 0);
	EXPECT_EQ(get_num(SWITCHES, "dma_quarantined"), self->lost);
	expect_nothing_isolated(_metadata);
}

TEST_F_TIMEOUT(dma, map, TIMEOUT)
{
	if (!arm("map", 3, -1))
		SKIP(return, "no fault injection (CONFIG_MIGRATION_BATCH_COPY_FAULTS)");
	move_in_mode(_metadata, &self->a, &(struct mode) { "ok", 0, "fellback" });
}

/* Memory that was free a moment ago, on both nodes. */
static void take_fresh(struct __test_metadata *_metadata, struct area *fresh)
{
	ASSERT_EQ(make_area(fresh, SMALL, 16 * MiB), NULL);
	ASSERT_GE(move_pages_to(fresh, fresh->node[1]), 0);
	fill(fresh, 99, 1);
}

/*
 * A device writes to its destinations after all. They must not be in use again, for
 * the folio that was to be copied or for another one.
 */
static void device_is_late(struct __test_metadata *_metadata, struct area *a, long lost)
{
	const long old = counted("dma_timeouts");
	struct area fresh = {};

	ASSERT_TRUE(put_num(SWITCHES, "dma_timeout_ms", 20));
	fill(a, 1, 1);
	ASSERT_TRUE(use_mode("hang", 3));
	move(a, false);
	EXPECT_EQ(bad_page(a), -1);
	EXPECT_GT(counted("dma_timeouts"), old);
	EXPECT_GT(get_num(SWITCHES, "dma_quarantined"), lost);
	ASSERT_TRUE(use_mode("ok", 0));
	fill(a, 2, 1);
	take_fresh(_metadata, &fresh);
	EXPECT_EQ(quarantined_after_release(lost), lost);
	EXPECT_EQ(bad_page(a), -1);
	EXPECT_EQ(bad_page(&fresh), -1);
	move_all(_metadata, a, false);
	expect_nothing_isolated(_metadata);
}

/* Kills mutant 66. */
TEST_F_TIMEOUT(dma, hang, TIMEOUT)
{
	device_is_late(_metadata, &self->a, self->lost);
}

/* The driver says that the device has stopped, but does not vouch for it. Kills 71. */
TEST_F_TIMEOUT(dma, forgotten, TIMEOUT)
{
	ASSERT_TRUE(put_num(DMA_TEST, "final", 0));
	device_is_late(_metadata, &self->a, self->lost);
}

/*
 * A batch takes longer than a device may take to answer, but the device answers all
 * the time: 512 pages, four at once, of 5 ms each. Kills mutant 72.
 */
TEST_F_TIMEOUT(dma, slow_batch, TIMEOUT)
{
	const long old = counted("dma_timeouts"), pages = counted("dma_pages");
	struct area slow = {};

	ASSERT_EQ(make_area(&slow, SMALL, 2 * MiB), NULL);
	ASSERT_TRUE(put_num(SWITCHES, "dma_timeout_ms", 300));
	ASSERT_TRUE(use_mode("slow", 0));
	fill(&slow, 1, 1);
	move_all(_metadata, &slow, false);
	EXPECT_GT(counted("dma_pages"), pages);
	EXPECT_EQ(counted("dma_timeouts"), old);
	expect_nothing_isolated(_metadata);
}

/*
 * The device is always just in time: after some such times, a batch is left to the
 * CPU, so that what has been unmapped need not wait for ever. 512 pages, four at
 * once, of 5 ms each; eight in a queue, which may take 50. Kills mutant 110.
 */
TEST_F_TIMEOUT(dma, just_in_time, TIMEOUT)
{
	long timeouts, fellback;
	struct area slow = {};

	ASSERT_EQ(make_area(&slow, SMALL, 2 * MiB), NULL);
	ASSERT_TRUE(put_num(SWITCHES, "dma_timeout_ms", 50));
	for (int i = 1; i <= 10; i++) {
		timeouts = counted("dma_timeouts");
		fellback = counted("fellback");
		ASSERT_TRUE(use_mode("slow", 0));
		fill(&slow, i, 1);
		move_all(_metadata, &slow, i % 2);
		/* Not so if this machine stood still for a while */
		if (counted("dma_timeouts") == timeouts)
			break;
		ASSERT_TRUE(put_in(SWITCHES, "engine", "dma"));
	}
	EXPECT_EQ(counted("dma_timeouts"), timeouts);
	EXPECT_GT(counted("fellback"), fellback);
	expect_nothing_isolated(_metadata);
}

/* Never more than so much, and then the engine is off. */
TEST_F_TIMEOUT(dma, quarantine_is_bounded, TIMEOUT)
{
	struct area *a = &self->a;
	char engine[128] = "";

	ASSERT_TRUE(put_num(SWITCHES, "dma_timeout_ms", 10));
	ASSERT_TRUE(use_mode("hang", 0));
	for (int i = 1; i <= MAX_MOVES && !strstr(engine, "[off]"); i++) {
		fill(a, i, 1);
		move(a, i % 2);
		ASSERT_EQ(bad_page(a), -1);
		ASSERT_LE(get_num(SWITCHES, "dma_quarantined"), (long)QUARANTINE);
		get_str(SWITCHES, "engine", engine, sizeof(engine));
		/* Channels that hang are not used: have them all again. */
		if (i % 8 == 0 && !strstr(engine, "[off]"))
			put_in(SWITCHES, "engine", "dma");
	}
	EXPECT_NE(strstr(engine, "[off]"), NULL);
	EXPECT_EQ(quarantined_after_release(self->lost), self->lost);
	EXPECT_EQ(use_engine("dma"), NULL);
	move_all(_metadata, a, false);
	move_in_mode(_metadata, a, &(struct mode) { "ok", 0, "dma_pages" });
}

/*
 * The driver goes while its device hangs: what the device may write to is never
 * free again. Last of all, as its memory is held until the next boot. Kills
 * mutant 70.
 */
TEST_F_TIMEOUT(dma, unbind_while_it_hangs, TIMEOUT)
{
	struct area *a = &self->a;

	/* "device driver has pending DMA allocations": that is what is tested. */
	if (!access("/sys/kernel/debug/dma-api", F_OK))
		SKIP(return, "CONFIG_DMA_API_DEBUG would warn");
	ASSERT_TRUE(put_num(SWITCHES, "dma_timeout_ms", 20));
	fill(a, 1, 1);
	ASSERT_TRUE(use_mode("hang", 3));
	move(a, false);
	ASSERT_GT(get_num(SWITCHES, "dma_quarantined"), self->lost);
	self->lost = get_num(SWITCHES, "dma_quarantined");
	ASSERT_TRUE(put_in(DMA_DRIVER, "unbind", DMA_DEVICE));
	EXPECT_EQ(get_num(SWITCHES, "dma_quarantined"), self->lost);
	EXPECT_EQ(bad_page(a), -1);
	/* Nobody is there: who migrates copies. */
	move_all(_metadata, a, false);
	ASSERT_TRUE(put_in(DMA_DRIVER, "bind", DMA_DEVICE));
	move_in_mode(_metadata, a, &(struct mode) { "ok", 0, "dma_pages" });
	/* Channels of the same name are stopped: that is not about the old ones. */
	move_in_mode(_metadata, a, &(struct mode) { "lost", 40, "dma_timeouts" });
	EXPECT_EQ(get_num(SWITCHES, "dma_quarantined"), self->lost);
	expect_nothing_isolated(_metadata);
}

/* The driver goes and comes, and then its device hangs, with some pages of @a. */
static long lose_some(struct __test_metadata *_metadata, struct area *a)
{
	ASSERT_TRUE(put_in(DMA_DRIVER, "unbind", DMA_DEVICE));
	ASSERT_TRUE(put_in(DMA_DRIVER, "bind", DMA_DEVICE));
	ASSERT_TRUE(put_in(SWITCHES, "engine", "dma"));
	ASSERT_TRUE(put_num(SWITCHES, "dma_timeout_ms", 20));
	ASSERT_TRUE(use_mode("hang", 0));
	move(a, false);
	EXPECT_EQ(bad_page(a), -1);
	return get_num(SWITCHES, "dma_quarantined");
}

/*
 * Devices can have half of the batches, and no more, however few pages they hold:
 * the others are there for who can still copy. After this there is no engine "dma"
 * until the next boot. Kills mutant 73.
 */
TEST_F_TIMEOUT(dma, loses_half_of_the_batches, TIMEOUT)
{
	long held = self->lost, now;
	struct area few = {};
	char engine[128] = "";
	int i;

	if (!access("/sys/kernel/debug/dma-api", F_OK))
		SKIP(return, "CONFIG_DMA_API_DEBUG would warn");
	ASSERT_EQ(make_area(&few, SMALL, 256 * 1024), NULL);
	for (i = 0; i < 8; i++) {
		now = lose_some(_metadata, &few);
		if (now == held)
			break;
		held = now;
	}
	self->lost = now;
	EXPECT_GE(i, 3);
	EXPECT_LE(i, 4);
	ASSERT_TRUE(get_str(SWITCHES, "engine", engine, sizeof(engine)));
	EXPECT_NE(strstr(engine, "[off]"), NULL);
	ASSERT_EQ(use_engine("threads"), NULL);
	held = counted("threads_pages");
	move_all(_metadata, &self->a, false);
	EXPECT_GT(counted("threads_pages"), held);
	expect_nothing_isolated(_metadata);
}

static pid_t main_pid;

/* What a test that was killed has left behind, too. Not for each child. */
static void restore_all(void)
{
	if (getpid() != main_pid)
		return;
	all_online();
	restore_switches();
	restore_others();
}

int main(int argc, char **argv)
{
	if (geteuid() || access(SWITCHES, F_OK))
		return test_harness_run(argc, argv);
	if (thp_available()) {
		struct thp_settings thp;

		/* khugepaged would collapse what is meant to be small. */
		thp_save_settings();
		thp_read_settings(&thp);
		thp.thp_enabled = THP_MADVISE;
		thp.khugepaged.defrag = false;
		thp_write_settings(&thp);
	}
	save_switches();
	main_pid = getpid();
	atexit(restore_all);
	return test_harness_run(argc, argv);
}
