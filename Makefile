# Two commands for a new user: `make demo` and `make test`. Both install what is missing first (Debian packages;
# Rust must be there) and work as root or with sudo, with or without hardware virtualisation.

.PHONY: demo test soak bench setup check guest help

help:
	@echo "make demo    the tutorial's whole journey on real VMs, proved"
	@echo "make test    all tests (30 minutes at most on 2 cores)"
	@echo "make soak    the long tests, and an hour of fuzzing for each target"
	@echo "make bench   measures speed against the aims and other tools (20 minutes on 2 cores)"
	@echo "make check   what this machine lacks for the above; installs nothing"
	@echo
	@echo "Needs Debian 12 or 13, Rust 1.94 and Node 20 or newer; everything else is installed (as root or with sudo)."

check:
	@scripts/setup.sh --check && echo "nothing is missing"

setup:
	@scripts/setup.sh test

guest:
	@scripts/setup.sh
	@cargo xtask guest

demo: guest
	@cargo build --quiet --release --package mainstay-cli
	@target/release/mainstay demo $(DEMO_ARGS)

test: guest
	@cargo xtask ci

# SOAK: only some of worlds, kills, fuzz. MAINSTAY_FUZZ_SECONDS: how long each fuzz target runs (an hour)
soak: setup guest
	@scripts/setup.sh soak
	@cargo xtask soak $(SOAK)

# BENCH_ARGS: --json FILE, --only NAME, --quick
bench: guest
	@scripts/setup.sh bench
	@cargo xtask bench $(BENCH_ARGS)
