# SPDX-License-Identifier: GPL-2.0
# make help

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help deps tree export mail kernel guest run check check-all mutants \
	bench profile clean distclean

# Debian's packages: installed when root, named otherwise.
deps:
	@scripts/deps

help: ## this list
	@echo 'mm-migrate: a series for Linux $(shell sed -n s/^VERSION=//p base/release | cut -f1) that makes folio migration faster and safer'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo
	@echo '  KERNEL_SRC=DIR|TARBALL  another source of the same Linux series'
	@echo '  BUILD=DIR               where everything is built (default: build/)'
	@echo '  JOBS=N                  compilers at once (default: all CPUs)'

run: deps ## stock kernel and series side by side, in a table (about 20 minutes)
	@scripts/run

check: deps ## prove it: series, static checks, three kernels, tests (75 minutes)
	@scripts/check

check-all: deps ## everything longer too: mutants, bench, other configurations; goes on where it stopped
	@scripts/check-all

tree: deps ## build/linux: the base and the series as git commits [TOPICS="a b"] [FORCE=1]
	@scripts/tree $(TOPICS)

export: deps ## write the commits of build/linux back to patches/ and new files
	@scripts/export

mail: deps ## build/mail: a series ready to send, TOPIC=name [SENDER="Name <address>"]
	@scripts/mail $(TOPIC)

kernel: tree ## build a kernel, NAME="series-lab" (stock|series-lab|bench|debug|off|tiny)
	@scripts/kernel $(or $(NAME),series-lab)

guest: deps ## an interactive shell in the lab kernel, NAME=series-lab [GUEST="--cpus 4 --mem 1G --tiers"]
	@[ -e $(or $(BUILD),build)/linux/.git ] || scripts/tree
	@scripts/kernel $(or $(NAME),series-lab)
	@scripts/guest-image
	@scripts/guest --kernel $(or $(BUILD),build)/out/$(or $(NAME),series-lab)/vmlinux $(GUEST)

.PHONY: soak
soak: deps ## fork storms against migrators on the debug kernel [MINUTES=10 | HOURS=N] [KERNEL=series-debug]
	@scripts/soak $(if $(SELFTEST),--self-test)

mutants: deps ## boot a kernel with planted bugs: each must be caught by the test named for it
	@scripts/mutants

bench: deps ## instruction counts, stock against series: JSON, table, chart [SCENARIO="a b"]
	@scripts/bench $(SCENARIO)

profile: deps ## where the time of the fork-heavy mbind goes, by perf, stock against series
	@scripts/profile

clean: ## remove what was built; the fetched base and build/linux stay
	rm -rf build/out build/src build/guest build/bench-bin build/log build/check
	-git -C build/linux worktree prune 2>/dev/null

distclean: ## remove build/ altogether, work in build/linux included
	rm -rf build
