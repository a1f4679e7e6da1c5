// SPDX-License-Identifier: GPL-2.0
/*
 * How long does it take to move memory, with each way to copy it that the
 * kernel has? One move_pages() call moves all of it, so that batches form inside
 * the kernel. All ways take turns on the same memory, in one boot: what counts is
 * the ratio within a pair, and the times only beside those of the same run.
 *
 *	off	engine off, bulk 0: what a kernel without the topic does
 *	bulk	engine off, bulk 1
 *	threads	engine threads, bulk 1: idle CPUs help
 *
 * A kernel without /sys/kernel/mm/migrate_copy has "off" only. With --busy a
 * process spins on each other CPU, so that none is idle. With --unmapped a few
 * more rounds, which are not timed for the pairs, trace how long page table
 * entries were migration entries.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"

#define PROG		"bench_copy_time"
#define SWITCHES	"/sys/kernel/mm/migrate_copy/"
/* Of our own: whatever else is traced on this machine is left alone. */
#define INSTANCE	"/sys/kernel/tracing/instances/bench_copy_time/"
#define MIN_ONE_KB	512UL
/* How long the spinners are looked at while nobody migrates. */
#define ALONE_NS	50000000ULL
/* For what the last measurement has woken up to sleep again. */
#define SETTLE_US	3000
/* What two events of one entry take in the buffer, and more. */
#define TRACE_BYTES	160UL
#define MAX_CPUS	1024
/*
 * TCG looks a page up in a table of its own, by the lower bits of its number: 12
 * or more after a while. Pages that have these in common with their copies are
 * thrown out of it by each other, at each byte, and take ten times as long. Large
 * folios have nine of them in common anyway.
 */
#define TCG_PAGES	4096UL
/* One page in so many may be such a one. */
#define TCG_SHARE	200
#define TCG_TRIES	10
/*
 * That table is small on a CPU that has been idle, 64 pages or so, and all of a
 * large folio are in the way of their copies then. It doubles when TLBs are
 * flushed, if it was full; it shrinks after 0.1 s in which it was not.
 */
#define TCG_TABLE	8192UL
#define TCG_SMALLEST	64UL

static struct region mem = { .kind = MEM_ANON, .folio_kb = 4 };
static unsigned long size_mb = 16, nr_pairs = 20, nr_traced = 3, call_kb;
static bool busy, one, unmapped, fresh, tcg;
static int cpu;

static const char * const counters[] = {
	"migrate_copy_bulk", "migrate_copy_bulk_pages",
	"migrate_copy_threads", "migrate_copy_threads_pages",
	"migrate_copy_helpers", "migrate_copy_helpers_pages",
	"migrate_copy_refused_small", "migrate_copy_refused_busy",
	"migrate_copy_refused_quota", "migrate_copy_refused_refs",
	"migrate_copy_refused_other", "migrate_copy_fellback",
	"migrate_copy_wasted", "pgmigrate_success", "pgmigrate_fail",
};

/* Microseconds from set to removed, of one traced round. */
struct traced {
	uint64_t nr, median, p99, max, ns;
};

struct way {
	const char *name, *engine, *bulk;
	uint64_t *ns;
	/* Loops of all spinners in a second, during the move and without it. */
	uint64_t *spun, *alone;
	struct traced *traced;
	long delta[ARRAY_SIZE(counters)];
	unsigned long changed_cpu, split, bad, failed, remade;
	/* TCG: how often tried again, and how often in vain. */
	unsigned long again, clashes;
};

static struct way ways[] = {
	{ .name = "off", .engine = "off", .bulk = "0" },
	{ .name = "bulk", .engine = "off", .bulk = "1" },
	{ .name = "threads", .engine = "threads", .bulk = "1" },
};

static unsigned int nr_ways = ARRAY_SIZE(ways);
static bool has_switches, has_bulk;

static void usage(void)
{
	fprintf(stderr,
"usage: bench_copy_time [option...]\n"
"  --folio KB     4, 16, 32, 64 ... 2048 (4)\n"
"  --mb N         memory moved, MB (16)\n"
"  --pairs N      each way is timed once a pair; one more warms up (20)\n"
"  --call KB      what one move_pages() call moves at most (all of it)\n"
"  --one          one folio of 512 kB or more is all that is moved\n"
"  --busy         a process spins on each CPU but the mover's\n"
"  --unmapped     also: how long entries were migration entries, traced\n"
"  --traced N     rounds of that, for each way (3)\n"
"  --fresh        new memory for each move, always node 0 -> 1; without it only\n"
"                 when folios have been split\n"
"  --tcg          moves between pages that slow TCG down are tried again\n"
"  --cpu N        where the mover begins (0); it is not bound to it\n");
	exit(EXIT_UNABLE);
}

static void check_options(void)
{
	if (one) {
		if (mem.folio_kb < MIN_ONE_KB || busy)
			usage();
		mem.bytes = mem.folio_kb * KB;
	} else {
		mem.bytes = size_mb * MB;
	}
	if (!nr_pairs || !nr_traced || mem.folio_kb < 4 ||
	    (mem.folio_kb & (mem.folio_kb - 1)) || mem.folio_kb > PMD_KB ||
	    !mem.bytes || mem.bytes % (mem.folio_kb * KB) ||
	    call_kb % mem.folio_kb)
		usage();
}

static void parse(int argc, char **argv)
{
	static const struct option opts[] = {
		{ "folio", required_argument, NULL, 'f' },
		{ "mb", required_argument, NULL, 'm' },
		{ "pairs", required_argument, NULL, 'p' },
		{ "call", required_argument, NULL, 'l' },
		{ "traced", required_argument, NULL, 't' },
		{ "cpu", required_argument, NULL, 'c' },
		{ "one", no_argument, NULL, 'o' },
		{ "busy", no_argument, NULL, 'b' },
		{ "unmapped", no_argument, NULL, 'u' },
		{ "fresh", no_argument, NULL, 'n' },
		{ "tcg", no_argument, NULL, 'g' },
		{ }
	};
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 'f': mem.folio_kb = parse_ulong("--folio", optarg); break;
		case 'm': size_mb = parse_ulong("--mb", optarg); break;
		case 'p': nr_pairs = parse_ulong("--pairs", optarg); break;
		case 'l': call_kb = parse_ulong("--call", optarg); break;
		case 't': nr_traced = parse_ulong("--traced", optarg); break;
		case 'c': cpu = parse_ulong("--cpu", optarg); break;
		case 'o': one = true; break;
		case 'b': busy = true; break;
		case 'u': unmapped = true; break;
		case 'n': fresh = true; break;
		case 'g': tcg = true; break;
		default: usage();
		}
	}
	if (optind != argc)
		usage();
	check_options();
}

/* The ways to copy, and how to have each. */

static void find_ways(void)
{
	unsigned int i;

	has_switches = !access(SWITCHES "engine", W_OK);
	if (!has_switches)
		nr_ways = 1;
	else
		require_file(SWITCHES "reasons", "all");
	has_bulk = has_switches && !write_file(SWITCHES "bulk", "1");
	for (i = 0; i < nr_ways; i++) {
		ways[i].ns = xcalloc(nr_pairs, sizeof(*ways[i].ns));
		ways[i].spun = xcalloc(nr_pairs, sizeof(*ways[i].spun));
		ways[i].alone = xcalloc(nr_pairs, sizeof(*ways[i].alone));
		ways[i].traced = xcalloc(nr_traced, sizeof(*ways[i].traced));
	}
}

static void choose(const struct way *way)
{
	if (!has_switches)
		return;
	require_file(SWITCHES "engine", way->engine);
	if (has_bulk)
		require_file(SWITCHES "bulk", way->bulk);
}

/* Those who keep the other CPUs busy: processes, so that no flush is for them. */

struct spinner {
	_Atomic uint64_t loops;
	_Atomic int cpu;
} __attribute__((aligned(128)));

static struct spinner *spinners;
static unsigned int nr_spinners;

static void __attribute__((noreturn)) spin(struct spinner *self, int where)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	pin_to_cpu(where);
	atomic_store(&self->cpu, sched_getcpu());
	for (;;)
		atomic_store_explicit(&self->loops, self->loops + 1,
				      memory_order_relaxed);
}

static void start_spinner(int where)
{
	struct spinner *self = &spinners[nr_spinners++];
	pid_t pid;

	atomic_store(&self->cpu, -1);
	pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (!pid)
		spin(self, where);
	/* Until it is there, and has done something since. */
	while (atomic_load(&self->cpu) != where)
		usleep(1000);
	while (!atomic_load(&self->loops))
		usleep(1000);
}

static uint64_t loops_of_all(void)
{
	uint64_t sum = 0;
	unsigned int i;

	for (i = 0; i < nr_spinners; i++)
		sum += atomic_load_explicit(&spinners[i].loops,
					    memory_order_relaxed);
	return sum;
}

/* The caller waits without sleeping: it takes a CPU, as when it migrates. */
static uint64_t spin_rate_alone(void)
{
	uint64_t loops = loops_of_all(), start = now_ns(), ns;

	do {
		ns = now_ns() - start;
	} while (ns < ALONE_NS);
	return (loops_of_all() - loops) * 1000000000.0 / ns;
}

static void check_spinners(void)
{
	uint64_t before[MAX_CPUS];
	unsigned int i;

	for (i = 0; i < nr_spinners; i++)
		before[i] = atomic_load(&spinners[i].loops);
	usleep(200000);
	for (i = 0; i < nr_spinners; i++)
		if (atomic_load(&spinners[i].loops) == before[i])
			die("the process that is to spin on CPU %d does not run",
			    atomic_load(&spinners[i].cpu));
}

static void start_spinners(void)
{
	cpu_set_t set;
	int i;

	spinners = mmap(NULL, MAX_CPUS * sizeof(*spinners),
			PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			-1, 0);
	if (spinners == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	if (!busy)
		return;
	run_anywhere();
	if (sched_getaffinity(0, sizeof(set), &set))
		die("sched_getaffinity: %s", strerror(errno));
	for (i = 0; i < MAX_CPUS; i++)
		if (i != cpu && CPU_ISSET(i, &set))
			start_spinner(i);
	if (!nr_spinners)
		die("--busy needs two CPUs");
	check_spinners();
}

/*
 * With --tcg: those who have the tables of all other CPUs grow, just before
 * something is timed. They have the kernel write to many pages, by asking for new
 * ones, and flush: more of either each time. Processes, so that no flush is for
 * them. The mover is the last, or its table might have shrunk again.
 */
static int *growers;
static int nr_growers;

static void grow_table(void)
{
	unsigned long pages;
	void *p;

	for (pages = TCG_SMALLEST; pages <= TCG_TABLE; pages *= 2) {
		p = mmap(NULL, pages * BASE_PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
		if (p == MAP_FAILED)
			die("mmap: %s", strerror(errno));
		munmap(p, pages * BASE_PAGE);
	}
}

static void __attribute__((noreturn)) be_grower(int fd, int where)
{
	char byte;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	pin_to_cpu(where);
	while (read(fd, &byte, 1) == 1) {
		grow_table();
		if (write(fd, &byte, 1) != 1)
			break;
	}
	exit(0);
}

static void start_grower(int where)
{
	int ends[2];
	pid_t pid;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
		die("socketpair: %s", strerror(errno));
	pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (!pid)
		be_grower(ends[1], where);
	close(ends[1]);
	growers[nr_growers++] = ends[0];
}

static void start_growers(void)
{
	int i, nr = sysconf(_SC_NPROCESSORS_ONLN);

	if (!tcg)
		return;
	growers = xcalloc(nr, sizeof(*growers));
	for (i = 0; i < nr; i++)
		if (i != cpu)
			start_grower(i);
}

static void grow_tables(void)
{
	char byte = 0;
	int i;

	if (!tcg)
		return;
	for (i = 0; i < nr_growers; i++)
		if (write(growers[i], &byte, 1) != 1)
			die("a process that is to help has gone");
	for (i = 0; i < nr_growers; i++)
		if (read(growers[i], &byte, 1) != 1)
			die("a process that is to help has gone");
	grow_table();
}

/* Moving. The arrays are made before, and are no part of the time. */

static struct {
	void **pages;
	int *nodes, *status;
	unsigned long nr, per_call;
} list;

static void make_list(void)
{
	list.nr = region_folios(&mem);
	list.per_call = call_kb ? call_kb / mem.folio_kb : list.nr;
	list.pages = xcalloc(list.nr, sizeof(*list.pages));
	list.nodes = xcalloc(list.nr, sizeof(*list.nodes));
	list.status = xcalloc(list.nr, sizeof(*list.status));
}

/* One address per folio: a second one of the same would end the batch. */
static void fill_list(int node)
{
	unsigned long i;

	for (i = 0; i < list.nr; i++) {
		list.pages[i] = mem.addr + i * mem.folio_kb * KB;
		list.nodes[i] = node;
		list.status[i] = -1;
	}
}

/* Returns the nanoseconds that the system calls took. */
static uint64_t timed_move(void)
{
	uint64_t start = now_ns(), ns;
	unsigned long i, nr;
	long ret = 0;

	for (i = 0; i < list.nr && !ret; i += nr) {
		nr = list.nr - i < list.per_call ? list.nr - i : list.per_call;
		ret = syscall(SYS_move_pages, 0, nr, list.pages + i,
			      list.nodes + i, list.status + i, MPOL_MF_MOVE);
	}
	ns = now_ns() - start;
	if (ret < 0)
		die("move_pages: %s", strerror(errno));
	return ns;
}

static unsigned long not_moved(int node)
{
	unsigned long i, bad = 0;

	for (i = 0; i < list.nr; i++)
		bad += list.status[i] != node;
	return bad;
}

/* Where the memory is now. */
static int at;

static void new_memory(void)
{
	if (mem.addr)
		region_unmap(&mem);
	region_make(&mem, 0);
	at = 0;
}

/* Others hold another part of each node, so that pages come from elsewhere. */
static void shift_memory(void)
{
	static struct region held[2];
	int node;

	for (node = 0; node < 2; node++) {
		struct region *r = &held[node];

		if (r->addr)
			region_unmap(r);
		r->folio_kb = PMD_KB;
		r->bytes = (1 + rand() % 13) * PMD_KB * KB;
		region_make(r, node);
	}
}

static uint64_t *frames_before, *frames;

static void read_frames(uint64_t *to)
{
	off_t off = (unsigned long)mem.addr / BASE_PAGE * sizeof(*to);
	size_t len = mem.bytes / BASE_PAGE * sizeof(*to);
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || pread(fd, to, len, off) != (ssize_t)len)
		die("/proc/self/pagemap: %s", strerror(errno));
	close(fd);
}

/* Whether too many pages were where they are in the way of their copies. */
static bool tcg_clash(void)
{
	size_t i, nr = 0, pages = mem.bytes / BASE_PAGE;

	if (!tcg)
		return false;
	read_frames(frames);
	for (i = 0; i < pages; i++)
		nr += (frames[i] ^ frames_before[i]) % TCG_PAGES == 0;
	return nr * TCG_SHARE > pages;
}

/* Memory of whole folios, with contents of its own; returns where it shall go. */
static int prepare(struct way *way)
{
	static uint64_t seed;

	if (fresh) {
		new_memory();
	} else if (region_intact_folios(&mem) != region_folios(&mem)) {
		way->remade++;
		new_memory();
	}
	region_fill(&mem, ++seed);
	if (tcg)
		read_frames(frames_before);
	fill_list(!at);
	choose(way);
	return !at;
}

/*
 * The mover must not be bound to a CPU, or no other could help. It begins on the
 * same one each time, and stays unless the scheduler has a reason.
 */
static void settle(void)
{
	usleep(SETTLE_US);
	pin_to_cpu(cpu);
	grow_tables();
	run_anywhere();
}

static bool verify(struct way *way, int to)
{
	unsigned long words = region_bad_words(&mem);
	unsigned long failed = not_moved(to);

	at = to;
	if (region_pages_on(&mem, to) != mem.bytes / BASE_PAGE)
		failed++;
	way->bad += words;
	way->failed += failed;
	way->split += region_folios(&mem) - region_intact_folios(&mem);
	/* What did not move is not where we think it is. */
	if (failed)
		new_memory();
	return !words && !failed;
}

/* Memory from elsewhere, as often as makes sense. Returns whether to. */
static bool try_again(struct way *way, unsigned int *tries)
{
	if (!tcg_clash())
		return false;
	if (++*tries == TCG_TRIES) {
		way->clashes++;
		return false;
	}
	way->again++;
	shift_memory();
	new_memory();
	return true;
}

/*
 * @pair is -1 for the warm-up, of which nothing is kept but mistakes. Returns
 * whether it has to be done again.
 */
static bool measure_once(struct way *way, long pair, unsigned int *tries)
{
	static struct stats before, after;
	uint64_t alone = 0, loops, ns;
	int to = prepare(way);
	unsigned int i;

	vmstat_read(&before);
	settle();
	if (busy)
		alone = spin_rate_alone();
	loops = loops_of_all();
	ns = timed_move();
	loops = loops_of_all() - loops;
	i = sched_getcpu();
	usleep(SETTLE_US);
	vmstat_read(&after);
	if (!verify(way, to))
		progress("%s: not all memory was moved, or is what it was",
			 way->name);
	if (pair < 0)
		return false;
	if (try_again(way, tries))
		return true;
	way->changed_cpu += i != (unsigned int)cpu;
	way->ns[pair] = ns;
	way->alone[pair] = alone;
	way->spun[pair] = loops * 1000000000.0 / ns;
	for (i = 0; i < ARRAY_SIZE(counters); i++)
		way->delta[i] += stat_delta(&before, &after, counters[i]);
	return false;
}

static void measure(struct way *way, long pair)
{
	unsigned int tries = 0;

	while (measure_once(way, pair, &tries))
		;
}

/* Who is first changes, and with it the direction of each way's moves. */
static struct way *nth_way(long round, unsigned int i)
{
	return &ways[round & 1 ? nr_ways - 1 - i : i];
}

static void measure_pairs(void)
{
	unsigned int i;
	long pair;

	for (pair = -1; pair < (long)nr_pairs; pair++)
		for (i = 0; i < nr_ways; i++)
			measure(nth_way(pair, i), pair);
}

/*
 * How long entries were migration entries. An event is written for each PTE, on
 * all kernels, also where several are set at a time; and one for each PMD. It
 * takes longer to write them than to set the entries: the times are too long,
 * and equally so on each side.
 */

static const char * const events[] = {
	"events/migrate/set_migration_pte/enable",
	"events/migrate/remove_migration_pte/enable",
	"events/thp/set_migration_pmd/enable",
	"events/thp/remove_migration_pmd/enable",
};

static void trace_events(const char *on)
{
	char path[256];
	unsigned int i;
	int ret;

	for (i = 0; i < ARRAY_SIZE(events); i++) {
		snprintf(path, sizeof(path), INSTANCE "%s", events[i]);
		ret = write_file(path, on);
		/* Only one of the pairs is needed. */
		if (ret && (i < 2 || mem.folio_kb == PMD_KB))
			die("%s: %s: this kernel does not trace it", path,
			    strerror(-ret));
	}
}

static void trace_setup(void)
{
	char text[32];

	if (mkdir(INSTANCE, 0700) && errno != EEXIST)
		die(INSTANCE ": %s (CONFIG_FTRACE?)", strerror(errno));
	require_file(INSTANCE "trace_clock", "mono");
	snprintf(text, sizeof(text), "%lu",
		 mem.bytes / BASE_PAGE * TRACE_BYTES / KB + 256);
	require_file(INSTANCE "buffer_size_kb", text);
	snprintf(text, sizeof(text), "%d", getpid());
	require_file(INSTANCE "set_event_pid", text);
}

struct event {
	bool set, pmd;
	uint64_t us;
	unsigned long addr;
};

/* "task-1  [000] .....  12.345678: set_migration_pte: addr=7f0000000000, ..." */
static bool parse_event(const char *line, struct event *e)
{
	const char *name = strstr(line, "set_migration_p");
	unsigned long sec, usec;
	const char *time, *addr;

	e->set = name;
	if (!name)
		name = strstr(line, "remove_migration_p");
	if (!name || name - line < 4)
		return false;
	for (time = name - 3; time > line && time[-1] != ' '; time--)
		;
	addr = strstr(name, "addr=");
	if (!addr || sscanf(time, "%lu.%6lu", &sec, &usec) != 2 ||
	    sscanf(addr, "addr=%lx", &e->addr) != 1)
		return false;
	e->pmd = strstr(name, "_pmd");
	e->us = sec * 1000000 + usec;
	return true;
}

static void check_kept(const char *line)
{
	unsigned long kept, written;

	if (sscanf(line, "# entries-in-buffer/entries-written: %lu/%lu",
		   &kept, &written) == 2 && kept != written)
		die("the trace buffer kept %lu of %lu events", kept, written);
}

/* Fills @us with what each entry took, and returns how many there are. */
static size_t read_trace(uint64_t *us, size_t max)
{
	size_t page, nr = 0, pages = mem.bytes / BASE_PAGE;
	uint64_t *since = xcalloc(pages, sizeof(*since));
	FILE *f = fopen(INSTANCE "trace", "re");
	struct event e;
	char line[512];

	if (!f)
		die(INSTANCE "trace: %s", strerror(errno));
	while (fgets(line, sizeof(line), f)) {
		check_kept(line);
		if (*line == '#' || !parse_event(line, &e))
			continue;
		page = (e.addr - (unsigned long)mem.addr) / BASE_PAGE;
		if (page >= pages)
			continue;
		if (!e.set && since[page] && nr < max)
			us[nr++] = e.us - since[page];
		since[page] = e.set ? e.us : 0;
	}
	fclose(f);
	free(since);
	return nr;
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static uint64_t at_share(const uint64_t *sorted, size_t n, double share)
{
	return n ? sorted[(size_t)((n - 1) * share + 0.5)] : 0;
}

static void sum_up_trace(struct traced *t)
{
	/* An entry may be set more than once, if a folio is tried again. */
	size_t max = 2 * mem.bytes / BASE_PAGE;
	uint64_t *us = xcalloc(max, sizeof(*us));

	t->nr = read_trace(us, max);
	qsort(us, t->nr, sizeof(*us), by_value);
	t->median = at_share(us, t->nr, 0.5);
	t->p99 = at_share(us, t->nr, 0.99);
	t->max = at_share(us, t->nr, 1);
	free(us);
}

/* To open it for writing from the start is what empties it. */
static void trace_clear(void)
{
	int fd = open(INSTANCE "trace", O_WRONLY | O_TRUNC);

	if (fd < 0)
		die(INSTANCE "trace: %s", strerror(errno));
	close(fd);
}

static bool trace_once(struct way *way, unsigned long round,
		       unsigned int *tries)
{
	int to = prepare(way);

	trace_clear();
	trace_events("1");
	settle();
	way->traced[round].ns = timed_move();
	trace_events("0");
	sum_up_trace(&way->traced[round]);
	if (!way->traced[round].nr)
		die("%s: no migration entry was traced", way->name);
	verify(way, to);
	return try_again(way, tries);
}

static void trace_one(struct way *way, unsigned long round)
{
	unsigned int tries = 0;

	while (trace_once(way, round, &tries))
		;
}

static void trace_rounds(void)
{
	unsigned long round;
	unsigned int i;

	if (!unmapped)
		return;
	trace_setup();
	for (round = 0; round < nr_traced; round++)
		for (i = 0; i < nr_ways; i++)
			trace_one(nth_way(round, i), round);
	rmdir(INSTANCE);
}

/* What there is to say: a line for each way, and one for each ratio. */

static uint64_t median_of(const uint64_t *val, size_t n)
{
	uint64_t *copy = xcalloc(n, sizeof(*copy)), median;

	memcpy(copy, val, n * sizeof(*copy));
	qsort(copy, n, sizeof(*copy), by_value);
	median = n & 1 ? copy[n / 2] : (copy[n / 2 - 1] + copy[n / 2]) / 2;
	free(copy);
	return median;
}

static void json_array(const char *key, const uint64_t *val, size_t n)
{
	size_t i;

	printf(", \"%s\": [", key);
	for (i = 0; i < n; i++)
		printf("%s%llu", i ? ", " : "", (unsigned long long)val[i]);
	putchar(']');
}

static void print_head(void)
{
	json_begin(PROG);
	json_int("folio_kb", mem.folio_kb);
	json_int("bytes", mem.bytes);
	json_int("folios", region_folios(&mem));
	json_int("call_kb", call_kb);
	json_int("pairs", nr_pairs);
	json_bool("one", one);
	json_bool("busy", busy);
	json_bool("fresh", fresh);
	json_bool("switches", has_switches);
	json_bool("bulk_possible", has_bulk);
}

static void print_counters(const struct way *way)
{
	const char *sep = "";
	unsigned int i;

	printf(", \"vmstat\": {");
	for (i = 0; i < ARRAY_SIZE(counters); i++) {
		if (!way->delta[i])
			continue;
		printf("%s\"%s\": %ld", sep, counters[i], way->delta[i]);
		sep = ", ";
	}
	putchar('}');
}

static bool way_ok(const struct way *way)
{
	return !way->bad && !way->failed;
}

static void print_way(const struct way *way)
{
	print_head();
	json_str("way", way->name);
	json_array("ns", way->ns, nr_pairs);
	json_int("median_ns", median_of(way->ns, nr_pairs));
	print_counters(way);
	if (busy) {
		json_int("spinners", nr_spinners);
		json_array("spun", way->spun, nr_pairs);
		json_array("alone", way->alone, nr_pairs);
	}
	json_int("changed_cpu", way->changed_cpu);
	json_int("folios_split", way->split);
	json_int("remade", way->remade);
	json_int("tcg_again", way->again);
	json_int("tcg_clashes", way->clashes);
	json_int("bad_words", way->bad);
	json_int("not_moved", way->failed);
	json_bool("ok", way_ok(way));
	json_end();
}

/* In nanoseconds, as everything here; the trace's clock shows microseconds. */
static void print_traced(const struct way *way)
{
	unsigned long i;

	print_head();
	json_str("way", way->name);
	json_str("entries", mem.folio_kb == PMD_KB ? "pmd" : "pte");
	json_str("note", "tracing adds to these times, equally on each side");
	printf(", \"unmapped\": [");
	for (i = 0; i < nr_traced; i++) {
		const struct traced *t = &way->traced[i];

		printf("%s{\"n\": %llu, \"median\": %llu, \"p99\": %llu, \"max\": %llu, \"move_ns\": %llu}",
		       i ? ", " : "", (unsigned long long)t->nr,
		       (unsigned long long)t->median * 1000,
		       (unsigned long long)t->p99 * 1000,
		       (unsigned long long)t->max * 1000,
		       (unsigned long long)t->ns);
	}
	putchar(']');
	json_bool("ok", way_ok(way));
	json_end();
}

static int by_double(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/* Pair by pair: how many times as fast as "off" another way is. */
static void print_ratio(const struct way *way)
{
	double *ratio = xcalloc(nr_pairs, sizeof(*ratio));
	unsigned long i;

	for (i = 0; i < nr_pairs; i++)
		ratio[i] = (double)ways[0].ns[i] / way->ns[i];
	qsort(ratio, nr_pairs, sizeof(*ratio), by_double);
	print_head();
	printf(", \"ratio\": \"off/%s\", \"median\": %.4f, \"min\": %.4f, \"max\": %.4f",
	       way->name, (ratio[(nr_pairs - 1) / 2] + ratio[nr_pairs / 2]) / 2,
	       ratio[0], ratio[nr_pairs - 1]);
	json_end();
	free(ratio);
}

static bool print_all(void)
{
	bool ok = true;
	unsigned int i;

	for (i = 0; i < nr_ways; i++) {
		print_way(&ways[i]);
		if (unmapped)
			print_traced(&ways[i]);
		if (i)
			print_ratio(&ways[i]);
		ok &= way_ok(&ways[i]);
	}
	return ok;
}

int main(int argc, char **argv)
{
	bench_init(PROG);
	parse(argc, argv);
	pin_and_reexec(cpu, argv);
	if (nr_nodes() < 2)
		die("two NUMA nodes are needed, this machine has %d", nr_nodes());
	quiet_guest();
	find_ways();
	make_list();
	/* Before there is memory that they would share. */
	start_spinners();
	start_growers();
	frames_before = xcalloc(mem.bytes / BASE_PAGE, sizeof(*frames));
	frames = xcalloc(mem.bytes / BASE_PAGE, sizeof(*frames));
	new_memory();
	measure_pairs();
	trace_rounds();
	choose(&ways[0]);
	return print_all() ? 0 : EXIT_WRONG;
}
