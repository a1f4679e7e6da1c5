// SPDX-License-Identifier: GPL-2.0
/*
 * Counts guest instructions per kernel function between two markers.
 *
 *   -plugin funcs.so,map=System.map,out=FILE[,edges=FILE]
 *           [,start=SYMBOL][,end=SYMBOL][,thread_size=BYTES]
 *
 * An interval begins at the first instruction of SYMBOL start and ends at the
 * first of SYMBOL end (two system calls that nothing else uses). The task
 * that entered start is "the task"; what interrupts do, and what other tasks
 * do meanwhile, is listed apart. A kernel without KASLR is required.
 *
 * How inclusive counts come about
 * -------------------------------
 * Every translated block is attributed to a function, and the way it ends is
 * decoded: call, ret, iret or other. When the next block starts, a shadow
 * stack is brought up to date: a call pushes, a ret pops down to the frame
 * that expects this address, a jump into another function (a tail call; or a
 * ret to where a function starts: a retpoline) pushes a frame that the
 * caller's ret pops with its own. A popped frame adds
 * the instructions that its task executed since to its function, unless the
 * same function is still on the stack (recursion counts once).
 *
 * One shadow stack belongs to one kernel stack, that is: to one task. Plugins
 * of this version cannot read registers, but they see the addresses of memory
 * accesses: the first push of the system call entry and the pops after the
 * stack switch of __switch_to_asm tell which kernel stack a CPU is on.
 *
 * An interrupt may arrive between any two blocks. It gets a root of its own,
 * and iret restores what was going on before; its instructions are taken out
 * of the functions it interrupted. Exceptions (page faults) are caused by the
 * code that they interrupt and count as called by it.
 *
 * Limits
 * ------
 * - Blocks are counted when they start: one that is left early, by an
 *   exception or for I/O, counts its rest twice. The total can be checked
 *   against guest time (-icount): it is off by about 0.01 %.
 * - A stack is known from its first system call or entry on. Tasks that sleep
 *   in the kernel when an interval begins have unknown outer frames; they are
 *   found again ret by ret ("resyncs" in the output, also for the task that
 *   is inside start's system call when counting begins).
 * - Inlined functions are their callers; .cold, .part, .isra and .constprop
 *   variants are merged with the function they were made of; functions of the
 *   same name are one.
 * - With several vCPUs running in parallel (no -icount), the end of an
 *   interval is not exact for the CPUs that run something else, and neither
 *   is the check of the total.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qemu_plugin_api.h"

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))
#define MAX_CPUS	64
#define MAX_DEPTH	256
#define STACK_BUCKETS	4096
#define TB_BUCKETS	65536
#define EDGE_BUCKETS	65536
#define MAX_TB_INSNS	1024

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;
QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id,
					   const qemu_info_t *info, int argc,
					   char **argv);

enum func_kind {
	FUNC_PLAIN,
	FUNC_SYSCALL,	/* entered from user space only: an empty stack */
	FUNC_NEW_TASK,	/* where a new task starts: an empty stack */
	FUNC_IRQ,	/* entered by an interrupt */
	FUNC_EXC,	/* entered by an exception */
};

struct func {
	char *name;
	enum func_kind kind;
};

struct sym {
	uint64_t addr;
	uint32_t func;
	char *name;
};

enum tb_end { END_OTHER, END_CALL, END_RET, END_IRET };

/* The rest of a block that runs on into the next symbol (assembly only). */
struct seg {
	uint32_t func;
	uint32_t insns;
};

/* What is known of a translated block. Immutable, never freed. */
struct tb {
	struct tb *next;
	uint64_t start, end;	/* end: first address behind, where a call returns */
	uint64_t func_start;
	uint32_t func;
	uint32_t insns;		/* in func */
	uint32_t total;
	enum tb_end how;
	bool user;
	uint32_t nr_segs;
	struct seg segs[];
};

#define FRAME_TAIL	1u	/* entered by a jump: goes when its caller returns */
#define FRAME_OUTER	2u	/* the first of its function on this stack */
#define FRAME_IRQ	4u	/* an interrupt's root */
#define FRAME_EXC	8u	/* an exception's root */
#define FRAME_GUESS	16u	/* found on the stack: we did not see its call */

struct frame {
	uint64_t ret;
	uint64_t start;		/* the stack's clock when it was entered */
	const struct tb *last;	/* roots: what the interrupt came between */
	uint32_t func;
	uint32_t flags;
};

enum ctx { CTX_TASK, CTX_IRQ, CTX_OTHER, NR_CTX };

static const char * const ctx_name[NR_CTX] = { "task", "irq", "other" };

struct stack {
	struct stack *next;
	uint64_t key;
	unsigned int interval;	/* stale when not the current one */
	enum ctx owner, ctx;
	uint64_t clock;		/* instructions executed on this stack */
	const struct tb *last;
	int depth;
	int base;		/* index of the current interrupt's root */
	struct frame f[MAX_DEPTH];
};

struct count {
	uint64_t excl, incl, calls;
};

struct edge {
	struct edge *next;
	uint32_t caller, callee;
	uint64_t incl, calls;
};

/* Only its own vCPU's thread writes here, until an interval is summed up. */
struct cpu {
	uint64_t key;		/* which kernel stack it is on */
	struct stack *stack;
	unsigned int interval;
	uint64_t resyncs;	/* rets to where no known frame expected one */
	uint64_t lost;		/* the same on a stack known from its root */
	struct count *count[NR_CTX];
	struct edge **edges;
};

static struct func *funcs;
static uint32_t nr_funcs;
static uint32_t func_user, func_unknown;
static struct sym *syms;
static size_t nr_syms;

static struct cpu cpus[MAX_CPUS];
static int nr_cpus;
static struct stack *stacks[STACK_BUCKETS];
static struct tb *tbs[TB_BUCKETS];
static struct tb *user_tbs[MAX_TB_INSNS + 1];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static const char *start_name = "__x64_sys_sched_get_priority_min";
static const char *end_name = "__x64_sys_sched_get_priority_max";
static uint64_t start_addr, end_addr, syscall_addr, switch_addr;
static uint64_t thread_size = 16384;
static FILE *out, *edge_out;

static atomic_bool active;
static unsigned int interval;
static uint64_t task_key;
static uint64_t executed, executed_at_start;	/* counted inline by TCG */

static void *xcalloc(size_t n, size_t size)
{
	void *p = calloc(n, size);

	if (!p) {
		fprintf(stderr, "funcs: out of memory\n");
		abort();
	}
	return p;
}

/* ---- symbols ---------------------------------------------------------- */

static bool starts_with(const char *s, const char *prefix)
{
	return !strncmp(s, prefix, strlen(prefix));
}

static enum func_kind func_kind(const char *name)
{
	if (!strcmp(name, "entry_SYSCALL_64"))
		return FUNC_SYSCALL;
	if (!strcmp(name, "ret_from_fork_asm"))
		return FUNC_NEW_TASK;
	if (starts_with(name, "asm_sysvec_") ||
	    !strcmp(name, "irq_entries_start") ||
	    !strcmp(name, "spurious_entries_start") ||
	    !strcmp(name, "asm_exc_nmi") ||
	    !strcmp(name, "asm_exc_machine_check"))
		return FUNC_IRQ;
	if (starts_with(name, "asm_exc_"))
		return FUNC_EXC;
	return FUNC_PLAIN;
}

/* Labels inside the system call entry are no functions of their own. */
static bool is_inner_label(const char *name)
{
	return starts_with(name, "entry_SYSCALL_64_") ||
	       starts_with(name, "entry_SYSRETQ_");
}

static void strip_suffix(char *name)
{
	static const char * const suffixes[] = {
		".cold", ".part.", ".isra.", ".constprop.", ".llvm.",
	};
	size_t i;
	char *p;

	for (i = 0; i < ARRAY_SIZE(suffixes); i++) {
		p = strstr(name, suffixes[i]);
		if (p && p != name)
			*p = '\0';
	}
}

static uint32_t func_add(const char *name)
{
	funcs[nr_funcs].name = strdup(name);
	funcs[nr_funcs].kind = func_kind(name);
	return nr_funcs++;
}

static int by_name(const void *a, const void *b)
{
	return strcmp(((const struct sym *)a)->name,
		      ((const struct sym *)b)->name);
}

/* Of several names for one address, a plain one without underscores. */
static int by_addr(const void *a, const void *b)
{
	const struct sym *x = a, *y = b;

	if (x->addr != y->addr)
		return x->addr < y->addr ? -1 : 1;
	if ((x->name[0] == '_') != (y->name[0] == '_'))
		return x->name[0] == '_' ? 1 : -1;
	return strcmp(x->name, y->name);
}

/* One function per name, in whatever variants it comes. */
static void number_funcs(void)
{
	size_t i;

	funcs = xcalloc(nr_syms + 2, sizeof(*funcs));
	func_user = func_add("[user]");
	func_unknown = func_add("[unknown]");
	for (i = 0; i < nr_syms; i++)
		strip_suffix(syms[i].name);
	qsort(syms, nr_syms, sizeof(*syms), by_name);
	for (i = 0; i < nr_syms; i++) {
		if (!i || strcmp(syms[i].name, syms[i - 1].name))
			func_add(syms[i].name);
		syms[i].func = nr_funcs - 1;
	}
	qsort(syms, nr_syms, sizeof(*syms), by_addr);
}

static void drop_aliases(void)
{
	size_t i, n = 0;

	for (i = 0; i < nr_syms; i++)
		if (!n || syms[i].addr != syms[n - 1].addr)
			syms[n++] = syms[i];
	nr_syms = n;
}

/* Called with every name, so that a marker may be an alias. */
static void note_address(const char *name, uint64_t addr)
{
	if (!strcmp(name, start_name))
		start_addr = addr;
	if (!strcmp(name, end_name))
		end_addr = addr;
	if (!strcmp(name, "entry_SYSCALL_64"))
		syscall_addr = addr;
	if (!strcmp(name, "__switch_to_asm"))
		switch_addr = addr;
}

static bool read_map(const char *path)
{
	FILE *f = fopen(path, "re");
	size_t room = 0;
	uint64_t addr;
	char line[512], name[256], type;

	if (!f) {
		perror(path);
		return false;
	}
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%" SCNx64 " %c %255s", &addr, &type, name) != 3)
			continue;
		if (!strchr("tTwW", type) || is_inner_label(name))
			continue;
		if (nr_syms == room) {
			room = room ? room * 2 : 65536;
			syms = realloc(syms, room * sizeof(*syms));
			if (!syms)
				abort();
		}
		note_address(name, addr);
		syms[nr_syms++] = (struct sym){ .addr = addr,
						.name = strdup(name) };
	}
	fclose(f);
	number_funcs();
	drop_aliases();
	return true;
}

static const struct sym *sym_of(uint64_t addr)
{
	size_t lo = 0, hi = nr_syms, mid;

	while (lo < hi) {
		mid = (lo + hi) / 2;
		if (syms[mid].addr <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo ? &syms[lo - 1] : NULL;
}

/* ---- the shadow stack ------------------------------------------------- */

static struct stack *stack_find(uint64_t key)
{
	struct stack **bucket = &stacks[key / thread_size % STACK_BUCKETS], *s;

	pthread_mutex_lock(&lock);
	for (s = *bucket; s; s = s->next)
		if (s->key == key)
			break;
	if (!s) {
		s = xcalloc(1, sizeof(*s));
		s->key = key;
		s->next = *bucket;
		*bucket = s;
	}
	pthread_mutex_unlock(&lock);
	return s;
}

/* A CPU whose stack is not known yet gets one of its own. */
static struct stack *current_stack(struct cpu *c)
{
	struct stack *s;

	if (c->stack && c->interval == interval)
		return c->stack;
	s = stack_find(c->key ? c->key : (uint64_t)(c - cpus + 1));
	if (s->interval != interval) {
		s->interval = interval;
		s->depth = 0;
		s->base = 0;
		s->clock = 0;
		s->last = NULL;
		s->owner = s->key == task_key ? CTX_TASK : CTX_OTHER;
		s->ctx = s->owner;
	}
	c->stack = s;
	c->interval = interval;
	return s;
}

static struct edge *edge_find(struct cpu *c, uint32_t caller, uint32_t callee)
{
	uint32_t h = (caller * 2654435761u ^ callee * 40503u) % EDGE_BUCKETS;
	struct edge *e;

	for (e = c->edges[h]; e; e = e->next)
		if (e->caller == caller && e->callee == callee)
			return e;
	e = xcalloc(1, sizeof(*e));
	e->caller = caller;
	e->callee = callee;
	e->next = c->edges[h];
	c->edges[h] = e;
	return e;
}

static bool on_stack(const struct stack *s, uint32_t func)
{
	int i;

	for (i = s->depth - 1; i >= s->base; i--)
		if (s->f[i].func == func)
			return true;
	return false;
}

static void push(struct stack *s, uint32_t func, uint64_t ret, uint32_t flags)
{
	struct frame *f;

	/* Never seen; but a corrupt count is better than a corrupt QEMU. */
	if (s->depth == MAX_DEPTH)
		s->depth = s->base;
	if (!on_stack(s, func))
		flags |= FRAME_OUTER;
	f = &s->f[s->depth++];
	f->func = func;
	f->ret = ret;
	f->flags = flags;
	f->start = s->clock;
	f->last = NULL;
}

static void count_call(struct cpu *c, const struct stack *s, uint32_t func)
{
	c->count[s->ctx][func].calls++;
}

static void pop(struct cpu *c, struct stack *s)
{
	struct frame *f = &s->f[--s->depth];
	uint64_t spent = s->clock - f->start;
	struct edge *e;

	if (f->flags & FRAME_OUTER)
		c->count[s->ctx][f->func].incl += spent;
	if (edge_out && s->ctx == CTX_TASK && s->depth) {
		e = edge_find(c, s->f[s->depth - 1].func, f->func);
		e->incl += spent;
		e->calls++;
	}
}

/* An interrupt is over: it never happened to the functions below it. */
static void leave_irq(struct stack *s)
{
	struct frame *root = &s->f[s->base];
	uint64_t spent = s->clock - root->start;
	int i;

	for (i = 0; i < s->base; i++)
		s->f[i].start += spent;
	s->ctx = s->owner;
	for (i = s->base - 1; i >= 0; i--) {
		if (!(s->f[i].flags & FRAME_IRQ))
			continue;
		s->ctx = CTX_IRQ;
		break;
	}
	s->base = i < 0 ? 0 : i;
}

static void unwind(struct cpu *c, struct stack *s, int depth)
{
	while (s->depth > depth) {
		const struct tb *last = s->f[s->depth - 1].last;
		bool irq = s->f[s->depth - 1].flags & FRAME_IRQ;

		pop(c, s);
		if (irq)
			leave_irq(s);
		if (irq || last)
			s->last = last;
	}
}

/* We are in a function that nobody is known to have called. */
static void resync(struct cpu *c, struct stack *s, const struct tb *tb)
{
	uint32_t guess = s->depth > s->base ? s->f[s->base].flags : FRAME_GUESS;

	c->resyncs++;
	if (!(guess & FRAME_GUESS))
		c->lost++;
	if (s->ctx == CTX_IRQ)
		unwind(c, s, s->base + 1);
	else
		unwind(c, s, 0);
	push(s, tb->func, 0, FRAME_GUESS);
}

/*
 * A jump into another function. One that is in the same chain of jumps is
 * gone back to, or two functions that jump to and fro would fill the stack.
 */
static void tail(struct cpu *c, struct stack *s, uint32_t func, bool entry)
{
	int i;

	if (s->depth && s->f[s->depth - 1].func == func)
		return;
	for (i = s->depth - 1; i >= s->base; i--) {
		if (s->f[i].func == func) {
			unwind(c, s, i + 1);
			return;
		}
		if (!(s->f[i].flags & FRAME_TAIL))
			break;
	}
	push(s, func, 0, s->depth ? FRAME_TAIL : FRAME_GUESS);
	if (entry)
		count_call(c, s, func);
}

static void do_call(struct cpu *c, struct stack *s, const struct tb *tb)
{
	/* Not a function: a call that only wants its return address. */
	if (tb->start != tb->func_start) {
		tail(c, s, tb->func, false);
		return;
	}
	push(s, tb->func, s->last->end, 0);
	count_call(c, s, tb->func);
}

static void do_ret(struct cpu *c, struct stack *s, const struct tb *tb)
{
	int i;

	for (i = s->depth - 1; i >= s->base; i--) {
		if (s->f[i].flags & (FRAME_IRQ | FRAME_EXC))
			break;
		if (s->f[i].ret != tb->start)
			continue;
		unwind(c, s, i);
		/* The caller itself may be a frame that was not seen. */
		if (!s->depth)
			push(s, tb->func, 0, FRAME_GUESS);
		else
			tail(c, s, tb->func, false);
		return;
	}
	/* A retpoline: the start of a function is jumped to by a ret. */
	if (tb->start == tb->func_start)
		tail(c, s, tb->func, true);
	else
		resync(c, s, tb);
}

static void advance(struct cpu *c, struct stack *s, const struct tb *tb);

/* Back to what the last interrupt or exception came between, if to any. */
static bool leave_root(struct cpu *c, struct stack *s)
{
	int i;

	for (i = s->depth - 1; i >= 0; i--)
		if (s->f[i].flags & (FRAME_IRQ | FRAME_EXC))
			break;
	s->last = NULL;
	if (i < 0)
		return false;
	unwind(c, s, i);
	/* One iret leaves one root. */
	if (s->last && s->last->how == END_IRET)
		s->last = NULL;
	return true;
}

static void do_iret(struct cpu *c, struct stack *s, const struct tb *tb)
{
	if (!leave_root(c, s)) {
		resync(c, s, tb);
		return;
	}
	/* An exception came before the block's end: it runs once more. */
	if (s->last && tb->start == s->last->start)
		s->last = NULL;
	advance(c, s, tb);
}

static void enter_irq(struct cpu *c, struct stack *s, const struct tb *tb)
{
	bool irq = funcs[tb->func].kind == FUNC_IRQ;
	const struct tb *last;

	/* Right after an iret: the one that it ended is over. */
	if (s->last && s->last->how == END_IRET && !leave_root(c, s))
		unwind(c, s, 0);
	last = s->last;
	if (irq) {
		s->ctx = CTX_IRQ;
		s->base = s->depth;
	}
	push(s, tb->func, 0, irq ? FRAME_IRQ : FRAME_EXC);
	/* push() may have found the stack full. */
	if (irq)
		s->base = s->depth - 1;
	s->f[s->depth - 1].last = last;
	count_call(c, s, tb->func);
}

/*
 * A block that goes on in its own middle was left there (by an exception, or
 * by QEMU to do I/O): the call or ret it ends with is still to come.
 */
static bool left_early(const struct tb *last, const struct tb *tb)
{
	return tb->start > last->start && tb->start < last->end;
}

/* Bring the stack from the end of the last block to the start of this one. */
static void advance(struct cpu *c, struct stack *s, const struct tb *tb)
{
	const struct tb *last = s->last;

	switch (!last || left_early(last, tb) ? END_OTHER : last->how) {
	case END_CALL:
		do_call(c, s, tb);
		break;
	case END_RET:
		do_ret(c, s, tb);
		break;
	case END_IRET:
		do_iret(c, s, tb);
		break;
	case END_OTHER:
		tail(c, s, tb->func, tb->start == tb->func_start);
		break;
	}
}

static bool is_entry(const struct tb *tb)
{
	enum func_kind kind = funcs[tb->func].kind;

	if (kind == FUNC_PLAIN)
		return false;
	/* A table of many entries, or one at its first instruction. */
	return tb->start == tb->func_start ||
	       strstr(funcs[tb->func].name, "_entries_start");
}

static void enter(struct cpu *c, struct stack *s, const struct tb *tb)
{
	switch (funcs[tb->func].kind) {
	case FUNC_SYSCALL:
	case FUNC_NEW_TASK:
		unwind(c, s, 0);
		push(s, tb->func, 0, 0);
		count_call(c, s, tb->func);
		break;
	default:
		enter_irq(c, s, tb);
		break;
	}
}

static void account(struct cpu *c, struct stack *s, uint32_t func,
		    uint32_t insns)
{
	c->count[s->ctx][func].excl += insns;
	s->clock += insns;
}

static void run_kernel(struct cpu *c, struct stack *s, const struct tb *tb)
{
	uint32_t i;

	if (is_entry(tb))
		enter(c, s, tb);
	else
		advance(c, s, tb);
	account(c, s, tb->func, tb->insns);
	for (i = 0; i < tb->nr_segs; i++) {
		tail(c, s, tb->segs[i].func, true);
		account(c, s, tb->segs[i].func, tb->segs[i].insns);
	}
	s->last = tb;
}

static void tb_exec(unsigned int vcpu, void *userdata)
{
	const struct tb *tb = userdata;
	struct cpu *c = &cpus[vcpu];
	struct stack *s;

	if (!atomic_load_explicit(&active, memory_order_relaxed))
		return;
	s = current_stack(c);
	if (!tb->user) {
		run_kernel(c, s, tb);
		return;
	}
	if (s->depth)
		unwind(c, s, 0);
	account(c, s, func_user, tb->total);
	s->last = NULL;
}

/* ---- which stack a CPU is on ------------------------------------------ */

static void stack_seen(unsigned int vcpu, qemu_plugin_meminfo_t info,
		       uint64_t vaddr, void *userdata)
{
	struct cpu *c = &cpus[vcpu];
	uint64_t key = vaddr & ~(thread_size - 1);

	(void)info;
	(void)userdata;
	if (c->key == key)
		return;
	c->key = key;
	c->stack = NULL;
}

/*
 * The block with the pops was accounted to the task that is left, with all
 * its instructions, and so was the way it ends: the task that is entered
 * ended in the very same way when it was left. One never seen did not, but
 * goes on from the same place.
 */
static void stack_switched(unsigned int vcpu, qemu_plugin_meminfo_t info,
			   uint64_t vaddr, void *userdata)
{
	struct cpu *c = &cpus[vcpu];
	const struct tb *tb = userdata;
	struct stack *s;

	stack_seen(vcpu, info, vaddr, NULL);
	if (!atomic_load_explicit(&active, memory_order_relaxed))
		return;
	s = current_stack(c);
	if (s->depth)
		return;
	push(s, tb->func, 0, FRAME_GUESS);
	s->last = tb;
}

/* ---- intervals -------------------------------------------------------- */

static void clear_counts(void)
{
	struct edge *e;
	int i, j;

	for (i = 0; i < nr_cpus; i++) {
		cpus[i].resyncs = 0;
		cpus[i].lost = 0;
		for (j = 0; j < NR_CTX; j++)
			memset(cpus[i].count[j], 0,
			       nr_funcs * sizeof(struct count));
		for (j = 0; edge_out && j < EDGE_BUCKETS; j++)
			for (e = cpus[i].edges[j]; e; e = e->next)
				e->incl = e->calls = 0;
	}
}

/* Runs before the block itself is counted. */
static void interval_start(unsigned int vcpu, void *userdata)
{
	(void)userdata;
	if (atomic_load(&active)) {
		fprintf(stderr, "funcs: start within an interval ignored\n");
		return;
	}
	clear_counts();
	interval++;
	task_key = cpus[vcpu].key;
	executed_at_start = executed;
	atomic_store(&active, true);
}

/* Functions that have not returned yet have cost what they cost so far. */
static void close_stacks(struct cpu *c)
{
	struct stack *s;
	int i;

	for (i = 0; i < STACK_BUCKETS; i++)
		for (s = stacks[i]; s; s = s->next)
			if (s->interval == interval)
				unwind(c, s, 0);
}

static struct count sum_of(enum ctx ctx, uint32_t func)
{
	struct count sum = { 0 };
	int i;

	for (i = 0; i < nr_cpus; i++) {
		sum.excl += cpus[i].count[ctx][func].excl;
		sum.incl += cpus[i].count[ctx][func].incl;
		sum.calls += cpus[i].count[ctx][func].calls;
	}
	return sum;
}

static void print_totals(uint64_t counted)
{
	uint64_t total[NR_CTX] = { 0 }, resyncs = 0, lost = 0;
	uint32_t f;
	int i;

	for (i = 0; i < NR_CTX; i++)
		for (f = 0; f < nr_funcs; f++)
			total[i] += sum_of(i, f).excl;
	for (i = 0; i < nr_cpus; i++) {
		resyncs += cpus[i].resyncs;
		lost += cpus[i].lost;
	}
	fprintf(out, "# interval %u executed %" PRIu64 " task %" PRIu64
		" irq %" PRIu64 " other %" PRIu64 " resyncs %" PRIu64
		" lost %" PRIu64 "\n", interval - 1, counted, total[CTX_TASK],
		total[CTX_IRQ], total[CTX_OTHER], resyncs, lost);
}

static void print_funcs(void)
{
	struct count sum;
	uint32_t f;
	int i;

	for (i = 0; i < NR_CTX; i++) {
		for (f = 0; f < nr_funcs; f++) {
			sum = sum_of(i, f);
			if (!sum.excl && !sum.incl)
				continue;
			fprintf(out, "%u\t%s\t%s\t%" PRIu64 "\t%" PRIu64
				"\t%" PRIu64 "\n", interval - 1, ctx_name[i],
				funcs[f].name, sum.excl, sum.incl, sum.calls);
		}
	}
	fflush(out);
}

static void print_edges(void)
{
	struct edge *e;
	int i, j;

	for (i = 0; i < nr_cpus; i++)
		for (j = 0; j < EDGE_BUCKETS; j++)
			for (e = cpus[i].edges[j]; e; e = e->next)
				if (e->calls)
					fprintf(edge_out, "%u\t%s\t%s\t%" PRIu64
						"\t%" PRIu64 "\n", interval - 1,
						funcs[e->caller].name,
						funcs[e->callee].name, e->incl,
						e->calls);
	fflush(edge_out);
}

static void interval_end(unsigned int vcpu, void *userdata)
{
	uint64_t counted = executed - executed_at_start;

	(void)userdata;
	if (!atomic_load(&active)) {
		fprintf(stderr, "funcs: end without a start ignored\n");
		return;
	}
	atomic_store(&active, false);
	close_stacks(&cpus[vcpu]);
	print_totals(counted);
	print_funcs();
	if (edge_out)
		print_edges();
}

static void finish(qemu_plugin_id_t id, void *userdata)
{
	(void)id;
	(void)userdata;
	if (atomic_load(&active))
		fprintf(stderr, "funcs: the guest ended within interval %u\n",
			interval - 1);
	fclose(out);
	if (edge_out)
		fclose(edge_out);
}

/* ---- translation ------------------------------------------------------ */

/* Skips what may stand before the opcode: legacy prefixes, then REX. */
static size_t opcode_at(const uint8_t *b, size_t len)
{
	size_t i = 0;

	while (i < len && strchr("\x66\x67\xf2\xf3\x2e\x36\x3e\x26\x64\x65",
				 b[i]) && b[i])
		i++;
	if (i < len && (b[i] & 0xf0) == 0x40)
		i++;
	return i;
}

static enum tb_end decode_end(const uint8_t *b, size_t len)
{
	size_t i = opcode_at(b, len);

	if (i >= len)
		return END_OTHER;
	switch (b[i]) {
	case 0xe8:
		return END_CALL;
	case 0xff:	/* group 5: /2 and /3 are calls */
		if (i + 1 < len && ((b[i + 1] >> 3) & 6) == 2)
			return END_CALL;
		return END_OTHER;
	case 0xc2:
	case 0xc3:
		return END_RET;
	case 0xcf:
		return END_IRET;
	default:
		return END_OTHER;
	}
}

static bool is_push_imm8(const uint8_t *b, size_t len)
{
	return len == 2 && b[0] == 0x6a;
}

static bool is_pop_reg(const uint8_t *b, size_t len)
{
	size_t i = opcode_at(b, len);

	return i + 1 == len && (b[i] & 0xf8) == 0x58;
}

static struct tb *tb_find(const struct tb *want, const struct seg *segs)
{
	uint64_t h = want->start ^ want->start >> 17 ^ want->total * 2654435761u;
	struct tb **bucket = &tbs[h % TB_BUCKETS], *tb;
	size_t size = want->nr_segs * sizeof(*segs);

	pthread_mutex_lock(&lock);
	for (tb = *bucket; tb; tb = tb->next)
		if (tb->start == want->start && tb->end == want->end &&
		    tb->total == want->total && tb->how == want->how)
			break;
	if (!tb) {
		tb = xcalloc(1, sizeof(*tb) + size);
		*tb = *want;
		memcpy(tb->segs, segs, size);
		tb->next = *bucket;
		*bucket = tb;
	}
	pthread_mutex_unlock(&lock);
	return tb;
}

static struct tb *user_tb(size_t n)
{
	struct tb *tb;

	if (n > MAX_TB_INSNS)
		n = MAX_TB_INSNS;
	pthread_mutex_lock(&lock);
	tb = user_tbs[n];
	if (!tb) {
		tb = xcalloc(1, sizeof(*tb));
		tb->total = n;
		tb->func = func_user;
		tb->user = true;
		user_tbs[n] = tb;
	}
	pthread_mutex_unlock(&lock);
	return tb;
}

/* Attributes each instruction; a block rarely holds a second symbol. */
static struct tb *kernel_tb(const struct qemu_plugin_tb *qtb, size_t n)
{
	struct seg segs[16];
	struct tb tb = { .start = qemu_plugin_tb_vaddr(qtb), .total = n };
	const struct sym *sym = sym_of(tb.start);
	uint64_t limit = sym && sym + 1 < syms + nr_syms ? sym[1].addr : ~0ULL;
	struct qemu_plugin_insn *insn = NULL;
	size_t i;

	tb.func = sym ? sym->func : func_unknown;
	tb.func_start = sym ? sym->addr : 0;
	for (i = 0; i < n; i++) {
		uint64_t addr;

		insn = qemu_plugin_tb_get_insn(qtb, i);
		addr = qemu_plugin_insn_vaddr(insn);
		if (addr >= limit && tb.nr_segs < ARRAY_SIZE(segs)) {
			sym = sym_of(addr);
			limit = sym + 1 < syms + nr_syms ? sym[1].addr : ~0ULL;
			segs[tb.nr_segs++] = (struct seg){ .func = sym->func };
		}
		if (tb.nr_segs)
			segs[tb.nr_segs - 1].insns++;
		else
			tb.insns++;
	}
	tb.end = qemu_plugin_insn_vaddr(insn) + qemu_plugin_insn_size(insn);
	tb.how = decode_end(qemu_plugin_insn_data(insn),
			    qemu_plugin_insn_size(insn));
	return tb_find(&tb, segs);
}

/*
 * The two places where the kernel shows which stack it is on. Both kinds of
 * access are asked for, because QEMU 7.2 delivers reads to nobody who asks
 * for reads only.
 */
static void watch_stack(const struct qemu_plugin_tb *qtb, const struct tb *tb,
			size_t n)
{
	size_t i;

	for (i = 0; i < n; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(qtb, i);
		const uint8_t *b = qemu_plugin_insn_data(insn);
		size_t len = qemu_plugin_insn_size(insn);

		if (tb->func_start == syscall_addr && is_push_imm8(b, len)) {
			qemu_plugin_register_vcpu_mem_cb(insn, stack_seen,
				QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW,
				NULL);
			return;
		}
		if (tb->func_start == switch_addr && is_pop_reg(b, len))
			qemu_plugin_register_vcpu_mem_cb(insn, stack_switched,
				QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW,
				(void *)tb);
	}
}

static void tb_trans(qemu_plugin_id_t id, struct qemu_plugin_tb *qtb)
{
	uint64_t addr = qemu_plugin_tb_vaddr(qtb);
	size_t n = qemu_plugin_tb_n_insns(qtb);
	struct tb *tb;

	(void)id;
	if (!n)
		return;
	tb = addr >> 63 ? kernel_tb(qtb, n) : user_tb(n);
	if (addr == start_addr)
		qemu_plugin_register_vcpu_tb_exec_cb(qtb, interval_start,
			QEMU_PLUGIN_CB_NO_REGS, NULL);
	if (addr == end_addr)
		qemu_plugin_register_vcpu_tb_exec_cb(qtb, interval_end,
			QEMU_PLUGIN_CB_NO_REGS, NULL);
	qemu_plugin_register_vcpu_tb_exec_cb(qtb, tb_exec,
		QEMU_PLUGIN_CB_NO_REGS, tb);
	/* After the callbacks: they see what was executed before this block. */
	qemu_plugin_register_vcpu_tb_exec_inline(qtb,
		QEMU_PLUGIN_INLINE_ADD_U64, &executed, n);
	if (tb->func_start == syscall_addr || tb->func_start == switch_addr)
		watch_stack(qtb, tb, n);
}

/* ---- options ---------------------------------------------------------- */

static FILE *create(const char *path, const char *header)
{
	FILE *f = fopen(path, "we");

	if (!f)
		perror(path);
	else
		fputs(header, f);
	return f;
}

static const char *value_of(const char *arg, const char *name)
{
	size_t len = strlen(name);

	return !strncmp(arg, name, len) && arg[len] == '=' ? arg + len + 1 : NULL;
}

static bool parse(int argc, char **argv, const char **map, const char **file,
		  const char **edges)
{
	const char *v;
	int i;

	for (i = 0; i < argc; i++) {
		if ((v = value_of(argv[i], "map")))
			*map = v;
		else if ((v = value_of(argv[i], "out")))
			*file = v;
		else if ((v = value_of(argv[i], "edges")))
			*edges = v;
		else if ((v = value_of(argv[i], "start")))
			start_name = strdup(v);
		else if ((v = value_of(argv[i], "end")))
			end_name = strdup(v);
		else if ((v = value_of(argv[i], "thread_size")))
			thread_size = strtoul(v, NULL, 0);
		else {
			fprintf(stderr, "funcs: unknown option %s\n", argv[i]);
			return false;
		}
	}
	if (!*map || !*file || !thread_size || thread_size & (thread_size - 1)) {
		fprintf(stderr, "funcs: map=, out= and a power of two as thread_size= are needed\n");
		return false;
	}
	return true;
}

static void cpus_init(int nr)
{
	int i, j;

	nr_cpus = nr;
	for (i = 0; i < nr; i++) {
		for (j = 0; j < NR_CTX; j++)
			cpus[i].count[j] = xcalloc(nr_funcs,
						   sizeof(struct count));
		if (edge_out)
			cpus[i].edges = xcalloc(EDGE_BUCKETS,
						sizeof(struct edge *));
	}
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
			char **argv)
{
	const char *map = NULL, *file = NULL, *edges = NULL;

	if (!info->system_emulation || strcmp(info->target_name, "x86_64") ||
	    info->system.max_vcpus > MAX_CPUS) {
		fprintf(stderr, "funcs: for x86_64 system emulation with at most %d CPUs\n",
			MAX_CPUS);
		return -1;
	}
	if (!parse(argc, argv, &map, &file, &edges) || !read_map(map))
		return -1;
	if (!start_addr || !end_addr || !syscall_addr || !switch_addr) {
		fprintf(stderr, "funcs: %s lacks %s, %s, entry_SYSCALL_64 or __switch_to_asm\n",
			map, start_name, end_name);
		return -1;
	}
	out = create(file, "interval\tcontext\tfunction\texclusive\tinclusive\tcalls\n");
	if (!out)
		return -1;
	if (edges) {
		edge_out = create(edges, "interval\tcaller\tcallee\tinclusive\tcalls\n");
		if (!edge_out)
			return -1;
	}
	cpus_init(info->system.max_vcpus);
	qemu_plugin_register_vcpu_tb_trans_cb(id, tb_trans);
	qemu_plugin_register_atexit_cb(id, finish, NULL);
	return 0;
}
