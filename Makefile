# Two commands for a new user: `make demo` and `make test`. Both install what is missing first (Debian packages;
# Rust must be there) and work as root or with sudo, with or without hardware virtualisation.

.PHONY: demo test soak bench setup check guest build install help

help:
	@echo "make demo    the tutorial's whole journey on real VMs, proved"
	@echo "make test    all tests (30 minutes at most on 2 cores)"
	@echo "make soak    the long tests, and an hour of fuzzing for each target"
	@echo "make bench   measures speed against the aims and other tools (20 minutes on 2 cores)"
	@echo "make check   what this machine lacks for the demo; FOR=\"test bench soak\": for those; installs nothing"
	@echo "make install what \`make build\` has made: program, completions, units; PREFIX (/usr/local), DESTDIR, PROGRAM"
	@echo
	@echo "Needs Debian 12 or 13, Rust 1.94 (with rustfmt and clippy) and Node 20 or newer; everything else is installed (as"
	@echo "root or with sudo)."

# FOR: also what some of test, bench, soak need
check:
	@scripts/setup.sh --check $(FOR) && echo "nothing is missing"

setup:
	@scripts/setup.sh test

guest:
	@scripts/setup.sh
	@cargo xtask guest

demo: guest
	@cargo run --quiet --release --package mainstay-cli --bin mainstay -- demo $(DEMO_ARGS)

build:
	@cargo build --release --locked --package mainstay-cli

# Builds nothing, because it is run as root, who may have no Rust. PROGRAM: what to install, if it was built elsewhere.
PREFIX ?= /usr/local
PROGRAM ?= $(or $(CARGO_TARGET_DIR),target)/release/mainstay
share = $(DESTDIR)$(PREFIX)/share

install:
	@test -x "$(PROGRAM)" || { echo "$(PROGRAM) is missing: run \`make build\` first, or say PROGRAM=" >&2; exit 1; }
	@install -D -m 755 "$(PROGRAM)" "$(DESTDIR)$(PREFIX)/bin/mainstay"
	@install -d "$(share)/bash-completion/completions" "$(share)/zsh/site-functions" "$(share)/fish/vendor_completions.d"
	@"$(PROGRAM)" completion bash > "$(share)/bash-completion/completions/mainstay"
	@"$(PROGRAM)" completion zsh > "$(share)/zsh/site-functions/_mainstay"
	@"$(PROGRAM)" completion fish > "$(share)/fish/vendor_completions.d/mainstay.fish"
	@install -D -m 644 docs/guides/install.md "$(share)/doc/mainstay/install.md"
	@for unit in server agent; do \
		install -d "$(DESTDIR)$(PREFIX)/lib/systemd/system"; \
		sed 's|/usr/local|$(PREFIX)|' packaging/systemd/mainstay-$$unit.service \
			> "$(DESTDIR)$(PREFIX)/lib/systemd/system/mainstay-$$unit.service"; \
	done
	@echo "installed; next: docs/guides/install.md"

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
