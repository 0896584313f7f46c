# make demo    a stick plugged into a virtual host appears in a guest, step by step
# make test    everything: format, lints, unit tests, scenarios on real kernels
# make check   what needs no virtual machine, in a minute
# make bench   speed, side by side with the host itself, QEMU's usb-host and others; see docs/developer/speed.md
# make deb     a Debian package;  make install  into this system;  make man  manual and completions

CARGO ?= cargo
export CARGO_TERM_COLOR ?= auto
# An error of a test says what went wrong; frames of the test runner behind it hide that in a cut log.
export RUST_LIB_BACKTRACE ?= 0

.PHONY: all setup build check test vm-test demo bench man install deb

all: build

# Installs the Debian packages that are missing, and says which.
setup:
	@vm-tests/setup.sh

build:
	$(CARGO) build --release --locked

check: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) test --workspace --locked --exclude vm-tests
	$(CARGO) test --locked -p vm-tests --lib
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --locked --no-deps --quiet

# The daemons under test are built with optimisation: an emulated host is slow enough.
vm-test: setup build
	$(CARGO) test --release --locked -p vm-tests --test scenarios -- --test-threads=2

test: check vm-test

demo: setup build
	$(CARGO) run --release --locked --quiet -p vm-tests --bin demo

bench: setup build
	$(CARGO) run --release --locked --quiet -p vm-tests --bin bench

# Man pages and completions, into target/made.
man:
	$(CARGO) run --release --locked --quiet -p packaging -- target/made

# As root, into the running system; DESTDIR= for a package.
install: build
	packaging/install.sh

deb: build
	packaging/deb/build.sh target/deb
