# `make help` lists what there is.

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Where `make demo` and `make bench-server` listen; any free ports.
DEMO_PORT ?= 50151
DEMO_METRICS_PORT ?= 9190
PARITY_VENV ?= target/parity-venv
PEERS_VENV ?= target/peers-venv
PEERS_OPENVINO_VENV ?= target/peers-openvino-venv
TRAIN_VENV ?= target/train-venv
EMBED_VENV ?= target/embed-venv
INTEROP_VENV ?= target/interop-venv
ATTACK_VENV ?= target/attack-venv
DOCS_VENV ?= target/docs-venv
CORPUS_VENV ?= target/corpus-venv
PROBE_VENV ?= target/probe-venv
# Below a directory of their own: the program of a wheel would find
# target/onnxruntime two directories above it, and not the one of its environment.
PYTHON_TOOLS ?= target/python/tools
PYTHON_TEST ?= target/python/test
PYTHON_ENGINES ?= target/python/engines
PYTHON_CHECK ?= target/python/check
# Wheel that `make python-test` and `make python-engines` install; they build one
# without it.
WHEEL ?=
# What else goes to pytest.
PYTEST_FLAGS ?=
# What `make corpus` compares; 500 JPEGs that it makes itself without a directory.
DIR ?= target/corpus
MDBOOK_VERSION ?= 0.5.4
# Program that `make docs-check` runs, and the pages that it checks (all by default).
DOCS_BINARY ?= target/demo/imagegpt
PAGES ?=
# What `make attack` attacks and `make bench-peers` measures, and which attacks: names or
# their beginnings.
BINARY ?= target/release/imagegpt
ATTACKS ?=
# What models/emoji was trained with; see models/train/train.py --help.
TRAIN_FLAGS ?= --minutes 100
# Of `make train-timed` and what follows it; see models/train/timed.py --help.
TRAIN_DATA ?= target/train/emoji.npz
TRAIN_SECONDS ?= 540
TRAIN_OUTPUT ?= target/train/candidate
# `--proxies --rounds 3 13 60` trains small models longer; see models/train/depth.py --help.
DEPTH_FLAGS ?=
# How long `make fuzz` runs.
FUZZ_SECONDS ?= 600

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

.PHONY: setup
setup: ## Bring ONNX Runtime's library (pinned, checksummed) to target/onnxruntime
	@scripts/onnxruntime.sh

.PHONY: build
build: setup ## Build the optimized binary: target/release/imagegpt
	cargo build --release --locked

.PHONY: demo
demo: setup ## Build target/demo/imagegpt (no link-time optimization), serve the trained model, draw what it makes of pictures
	cargo build --profile demo --locked
	@PORT=$(DEMO_PORT) METRICS_PORT=$(DEMO_METRICS_PORT) scripts/demo.sh

.PHONY: demo-page
demo-page: setup ## Build target/demo/imagegpt and serve the trained model with the page for browsers, until Ctrl-C
	cargo build --profile demo --locked
	@PORT=$(DEMO_PORT) METRICS_PORT=$(DEMO_METRICS_PORT) scripts/demo-page.sh

.PHONY: web
web: web/node_modules/.package-lock.json ## Build the page of `serve --playground` from web/: web/dist (brings esbuild and TypeScript, with npm)
	node web/build.mjs

.PHONY: web-check
web-check: web/node_modules/.package-lock.json ## Build the page anew, and fail unless web/dist has the same bytes
	node web/build.mjs --check

# BINARY=target/debug/imagegpt takes what `cargo build` has made, and builds none.
.PHONY: web-test
web-test: $(if $(filter target/release/%,$(BINARY)),build) web/node_modules/.package-lock.json ## Try the page in Chromium (Debian's chromium) against a worker of BINARY
	BINARY=$(BINARY) node --test --test-reporter=spec web/tests/page.test.mjs

.PHONY: bench-page
bench-page: $(if $(filter target/release/%,$(BINARY)),build) web/node_modules/.package-lock.json ## Measure the page in Chromium: first paint, first streamed row
	BINARY=$(BINARY) node web/tests/measure.mjs

.PHONY: web-pictures
web-pictures: $(if $(filter target/release/%,$(BINARY)),build) web/node_modules/.package-lock.json ## Draw the screenshots of the page in docs/images
	BINARY=$(BINARY) node web/tests/screenshots.mjs

web/node_modules/.package-lock.json: web/package-lock.json
	npm ci --prefix web --silent --no-audit --no-fund
	touch $@

.PHONY: test
test: setup ## Run all tests
	cargo test --locked --lib --bins --tests

.PHONY: check
check: setup ## All that CI checks: format, lints, documentation, tests
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps
	cargo test --locked --lib --bins --tests

.PHONY: docs
docs: target/tools/bin/mdbook ## Build README's pages as a book: target/docs/index.html (builds mdbook first)
	scripts/docs.sh

target/tools/bin/mdbook:
	cargo install --locked --debug --version $(MDBOOK_VERSION) --root target/tools mdbook

.PHONY: docs-check
docs-check: docs-links python-stubs $(DOCS_VENV)/.done ## Run the commands of README and docs/ (PAGES="docs/cli.md" for some), after `make demo` or with BINARY=
	DOCS_PYTHON=$(DOCS_VENV)/bin/python BINARY=$(DOCS_BINARY) python3 scripts/docs_check.py $(PAGES)

$(DOCS_VENV)/.done: scripts/docs/requirements.txt
	python3 -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

.PHONY: docs-links
docs-links: ## Check every link between this repository's Markdown files (Node.js with npm)
	npm install --silent --no-audit --no-fund --prefix target/docs-tools remark-cli@12.0.1 remark-validate-links@13.1.0
	target/docs-tools/node_modules/.bin/remark --no-config --quiet --frail --no-stdout \
	    --use "$(CURDIR)/target/docs-tools/node_modules/remark-validate-links/index.js=repository:false,root:\".\"" \
	    $$(git ls-files --cached --others --exclude-standard '*.md')

.PHONY: fuzz
fuzz: ## Tamper with images for ten minutes (FUZZ_SECONDS), every decode within its limits in memory and time
	prlimit --as=4294967296 env IMAGEGPT_FUZZ_SECONDS=$(FUZZ_SECONDS) IMAGEGPT_FUZZ_SEED=$$(date +%s) \
	    cargo test --locked --test decode tampered_files -- --nocapture

.PHONY: loom
loom: ## Try every order in which the worker's threads may meet (loom)
	cargo run --locked --manifest-path tests/loom/Cargo.toml

.PHONY: deny
deny: target/tools/bin/cargo-deny target/tools/bin/cargo-machete ## Check dependencies: licenses, sources, advisories where their database can be reached, and that each is used (builds cargo-deny and cargo-machete first)
	target/tools/bin/cargo-deny --locked check bans licenses sources
	scripts/advisories.sh
	target/tools/bin/cargo-machete

target/tools/bin/cargo-deny:
	cargo install --locked --version 0.20.2 --root target/tools cargo-deny

# Not optimized: it builds in a third of the time, and reads the sources in a second.
target/tools/bin/cargo-machete:
	cargo install --locked --debug --version 0.9.2 --root target/tools cargo-machete

.PHONY: bench
bench: setup $(CORPUS_VENV)/.done ## Measure decoding, resizing and tokens on one core beside Pillow (images per second)
	$(CORPUS_VENV)/bin/python scripts/bench_pictures.py

.PHONY: bench-overhead
bench-overhead: setup ## Measure images per second through gRPC against the bare engine
	cargo bench --locked --bench overhead

.PHONY: bench-gap
bench-gap: setup ## Measure how long an engine has nothing to run between two batches
	cargo bench --locked --bench gap

.PHONY: bench-server
bench-server: build ## Measure the server alone, with an engine that costs nothing: requests per second and core
	@MODEL=models/untrained PORT=$(DEMO_PORT) METRICS_PORT=$(DEMO_METRICS_PORT) scripts/bench-server.sh

.PHONY: bench-traces
bench-traces: build $(PYTHON_CHECK)/.done ## Measure what traces cost the server: without a collector and with 1 % of the calls, in turns
	@MODEL=models/untrained PORT=$(DEMO_PORT) METRICS_PORT=$(DEMO_METRICS_PORT) BINARY=$(BINARY) PYTHON=$(PYTHON_CHECK)/bin/python scripts/bench-traces.sh

.PHONY: bench-scheduler
bench-scheduler: build ## Measure overload, interactive calls beside bulk, and slow readers
	@MODEL=models/untrained PORT=$(DEMO_PORT) METRICS_PORT=$(DEMO_METRICS_PORT) scripts/bench-scheduler.sh

.PHONY: soak
soak: build ## Ten minutes of mixed load of two callers with cancels and garbage, every answer verified, and a log that fails
	@MODEL=models/untrained PORT=$(DEMO_PORT) METRICS_PORT=$(DEMO_METRICS_PORT) scripts/soak.sh --rss-slope-max 256

# ATTACK_SHORT=1 takes under a minute; BINARY=target/debug/imagegpt takes what `cargo build` has made, and builds none.
.PHONY: attack
attack: $(if $(filter target/release/%,$(BINARY)),build) $(ATTACK_VENV)/.done ## Attack a worker on this machine: which promises hold, its memory, a good client beside (5 minutes)
	@BINARY=$(BINARY) ATTACK_SHORT=$(ATTACK_SHORT) $(ATTACK_VENV)/bin/python scripts/attack/attack.py $(ATTACKS)

$(ATTACK_VENV)/.done: scripts/attack/requirements.txt
	python3 -m venv $(ATTACK_VENV)
	$(ATTACK_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

.PHONY: soak-generate
soak-generate: build $(PARITY_VENV)/.done ## Five minutes of callers that start, cancel and finish images at random (brings PyTorch)
	@PARITY_VENV=$(PARITY_VENV) scripts/soak-generate.sh

.PHONY: bench-attention
bench-attention: setup ## Measure the attention kernels beside ONNX Runtime's
	cargo bench --locked --bench attention -- 2 40
	cargo bench --locked --bench cached_attention -- 2 25
	cargo bench --locked --bench layers -- 2 25

.PHONY: bench-graphs
bench-graphs: build $(PARITY_VENV)/.done ## Measure compiled graphs beside the model card's recipe (brings PyTorch)
	@PARITY_VENV=$(PARITY_VENV) scripts/bench-graphs.sh

# BINARY=target/demo/imagegpt measures what `make demo` has made, and builds none.
.PHONY: bench-peers
bench-peers: setup $(if $(filter target/release/%,$(BINARY)),build) $(PEERS_VENV)/.done $(PEERS_OPENVINO_VENV)/.done ## Measure features on a CPU beside OpenVINO and the model card's recipe (brings PyTorch and OpenVINO: 7 GB)
	@BINARY=$(BINARY) PEERS_VENV=$(PEERS_VENV) PEERS_OPENVINO_VENV=$(PEERS_OPENVINO_VENV) scripts/bench-peers.sh

$(PEERS_VENV)/.done: scripts/bench-peers/requirements.txt
	python3 -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

# A virtual environment of its own, because the package writes the same directory as onnxruntime.
$(PEERS_OPENVINO_VENV)/.done: scripts/bench-peers/openvino-requirements.txt
	python3 -m venv $(PEERS_OPENVINO_VENV)
	$(PEERS_OPENVINO_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

.PHONY: bench-generate
bench-generate: build $(PARITY_VENV)/.done ## Measure generation beside transformers and the bare graph (brings PyTorch)
	@PARITY_VENV=$(PARITY_VENV) scripts/bench-generate.sh

.PHONY: kernels
kernels: ## Compile src/gpu/kernels/*.cu to the PTX that the worker carries
	@scripts/kernels.sh

.PHONY: bench-gpu
bench-gpu: build ## Measure a GPU: engine, gRPC, generation, precisions, soak, PyTorch (PROVIDER=cpu tries it without one)
	@scripts/bench-gpu.sh

.PHONY: bench-memory
bench-memory: build $(PARITY_VENV)/.done ## Measure the memory of a worker with all tasks of imagegpt-small (brings PyTorch)
	@PARITY_VENV=$(PARITY_VENV) scripts/bench-memory.sh

.PHONY: parity
parity: build $(PARITY_VENV)/.done ## Compare a running worker and compiled graphs with transformers (brings PyTorch: several GB)
	@PARITY_VENV=$(PARITY_VENV) scripts/parity.sh
	ORT_DYLIB_PATH=$(CURDIR)/target/onnxruntime/libonnxruntime.so \
	    $(PARITY_VENV)/bin/python tests/parity/compile_parity.py target/release/imagegpt

.PHONY: bench-embed
bench-embed: build $(EMBED_VENV)/.done ## Measure dataset jobs: images/s at 1k, 10k and 100k, memory, and what the client costs
	$(EMBED_VENV)/bin/python scripts/embed/bench.py

.PHONY: embed-chaos
embed-chaos: build $(EMBED_VENV)/.done ## Kill dataset jobs at 20 moments, on a disk, with S3 (moto), from the hub's calls, from tables of URLs, in int8 and while errors are retried, and compare every byte
	$(EMBED_VENV)/bin/python scripts/embed/chaos.py
	$(EMBED_VENV)/bin/python scripts/embed/chaos.py --s3
	$(EMBED_VENV)/bin/python scripts/embed/chaos.py --hub
	$(EMBED_VENV)/bin/python scripts/embed/chaos.py --urls
	$(EMBED_VENV)/bin/python scripts/embed/chaos.py --int8
	$(EMBED_VENV)/bin/python scripts/embed/retry.py

.PHONY: embed-stores
embed-stores: build $(EMBED_VENV)/.done ## Read and write datasets over HTTP, the protocols of Azure, Google and the Hugging Face Hub, with servers on this machine
	npm install --silent --no-audit --no-fund --prefix target/azurite azurite@3.35.0
	$(EMBED_VENV)/bin/python scripts/embed/stores.py
	$(EMBED_VENV)/bin/python scripts/embed/hub.py

.PHONY: embed-slurm
embed-slurm: build $(EMBED_VENV)/.done ## Run deploy/slurm on a Slurm of one node (root, Debian's slurm-wlm), kill a task, and compare the table
	$(EMBED_VENV)/bin/python scripts/embed/slurm.py

.PHONY: interop-embed
interop-embed: build $(EMBED_VENV)/.done ## Read tables with pyarrow, pandas, polars, DuckDB and datasets, and fit a probe from one
	$(EMBED_VENV)/bin/python scripts/embed/interop.py

$(EMBED_VENV)/.done: scripts/embed/requirements.txt
	python3 -m venv $(EMBED_VENV)
	$(EMBED_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

.PHONY: interop
interop: build $(INTEROP_VENV)/.done ## Call the worker as clients of Triton and KServe do (brings them: half a GB)
	@INTEROP_VENV=$(INTEROP_VENV) scripts/interop.sh

.PHONY: python-stubs
python-stubs: $(PYTHON_TOOLS)/.done ## Generate the messages of proto/ into the Python package
	@PYTHON=$(PYTHON_TOOLS)/bin/python scripts/python/stubs.sh

# WHEEL_PROFILE=demo builds it sooner.
.PHONY: wheel
wheel: $(PYTHON_TOOLS)/.done ## Build the wheel of `imagegpt` with the program in it: target/wheels (brings zig)
	@PYTHON=$(PYTHON_TOOLS)/bin/python scripts/python/wheel.sh

.PHONY: python-test
python-test: $(if $(WHEEL),,wheel) ## Install the wheel into an empty environment and test it there (WHEEL= names one)
	@VENV=$(PYTHON_TEST) WHEEL=$(WHEEL) scripts/python/test.sh $(PYTEST_FLAGS)

.PHONY: python-engines
python-engines: $(if $(WHEEL),,wheel) ## The same with Ray and Spark (needs Java 17: Debian's default-jre-headless)
	@VENV=$(PYTHON_ENGINES) WHEEL=$(WHEEL) scripts/python/test.sh --engines $(PYTEST_FLAGS)

# BINARY=target/debug/imagegpt takes what `cargo build` has made, and builds none.
.PHONY: python-check
python-check: $(if $(filter target/release/%,$(BINARY)),build) python-stubs $(PYTHON_CHECK)/.done ## Test the Python client from its sources, without a wheel, with BINARY
	@VENV=$(PYTHON_CHECK) BINARY=$(BINARY) scripts/python/check.sh $(PYTEST_FLAGS)

.PHONY: bench-python
bench-python: build python-stubs $(PYTHON_CHECK)/.done ## Measure the Python client's streams beside `imagegpt embed`: images/s, CPU time, memory
	PYTHONPATH=python/src $(PYTHON_CHECK)/bin/python scripts/python/bench.py

.PHONY: python-probe
python-probe: $(if $(filter target/release/%,$(BINARY)),build) python-stubs $(PYTHON_CHECK)/.done ## Fit scikit-learn's classifiers on features of the emoji, serve them and compare every prediction (brings the emoji, with npm), with BINARY
	IMAGEGPT_BINARY=$(abspath $(BINARY)) $(PYTHON_CHECK)/bin/python scripts/python/emoji_probe.py

$(PYTHON_TOOLS)/.done: scripts/python/requirements.txt
	python3 -m venv $(PYTHON_TOOLS)
	$(PYTHON_TOOLS)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(PYTHON_CHECK)/.done: python/pyproject.toml python/tests/requirements.txt
	VENV=$(PYTHON_CHECK) scripts/python/check.sh --setup
	touch $@

.PHONY: train
train: $(TRAIN_VENV)/.done ## Train models/emoji again, or go on (brings PyTorch and the emoji; 100 minutes)
	OMP_WAIT_POLICY=PASSIVE $(TRAIN_VENV)/bin/python models/train/train.py $(TRAIN_FLAGS)

# TRAIN_PYTHON=python3 takes an interpreter that has PyTorch already, and brings none.
TRAIN_PYTHON ?= $(TRAIN_VENV)/bin/python
TRAIN_DONE = $(if $(filter $(TRAIN_VENV)/%,$(TRAIN_PYTHON)),$(TRAIN_VENV)/.done)

.PHONY: train-data
train-data: $(TRAIN_VENV)/.done ## Write what `make train-timed` needs into one file, target/train/emoji.npz (brings the emoji)
	$(TRAIN_VENV)/bin/python models/train/data.py --prepared $(TRAIN_DATA)

.PHONY: train-timed
train-timed: $(TRAIN_DONE) ## Train a larger model than models/emoji for TRAIN_SECONDS on a GPU, from that file, without network
	$(TRAIN_PYTHON) models/train/timed.py --data $(TRAIN_DATA) --output $(TRAIN_OUTPUT) --seconds $(TRAIN_SECONDS) $(TIMED_FLAGS)

# BINARY=target/demo/imagegpt takes what `make demo` has made, and builds none.
.PHONY: train-keep
train-keep: $(if $(filter target/release/%,$(BINARY)),build) $(TRAIN_VENV)/.done ## Compare that model with models/emoji by held-out loss and probe, and put it there if both are better
	BINARY=$(BINARY) $(TRAIN_VENV)/bin/python models/train/keep.py $(TRAIN_OUTPUT) $(KEEP_FLAGS)

.PHONY: baselines
baselines: $(TRAIN_VENV)/.done ## Print the held-out loss of models/emoji beside those of counting colors
	$(TRAIN_VENV)/bin/python models/train/baselines.py

.PHONY: probe
probe: $(if $(filter target/release/%,$(BINARY)),build) $(TRAIN_VENV)/.done ## Fit linear probes on every layer of models/emoji with `imagegpt probe fit`; writes the head and its figures
	@BINARY=$(BINARY) TRAIN_VENV=$(TRAIN_VENV) scripts/probe.sh

.PHONY: depth
depth: $(TRAIN_VENV)/.done ## Find out which layers of models/emoji are best, and why (half an hour of one core)
	OMP_NUM_THREADS=1 $(TRAIN_VENV)/bin/python models/train/depth.py $(DEPTH_FLAGS)

$(TRAIN_VENV)/.done: models/train/requirements.txt
	python3 -m venv $(TRAIN_VENV)
	$(TRAIN_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(INTEROP_VENV)/.done: tests/interop/requirements.txt
	python3 -m venv $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(PARITY_VENV)/.done: tests/parity/requirements.txt
	python3 -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

.PHONY: golden
golden: $(PARITY_VENV)/.done ## Remake the golden data of the preprocessing tests
	$(PARITY_VENV)/bin/python tests/golden/make_golden.py

.PHONY: corpus
corpus: $(CORPUS_VENV)/.done ## Compare the decoders with Pillow over DIR: files that are equal, that differ, that one side refuses
	cargo build --release --locked --example pixels
	$(if $(filter target/corpus,$(DIR)),$(CORPUS_VENV)/bin/python scripts/corpus/make_jpegs.py $(DIR))
	$(CORPUS_VENV)/bin/python scripts/corpus/compare.py $(DIR)

.PHONY: probe-golden
probe-golden: $(PROBE_VENV)/.done ## Remake the fits of scikit-learn that those of src/probe are compared with
	$(PROBE_VENV)/bin/python scripts/probe/golden.py

.PHONY: bench-probe
bench-probe: build $(PROBE_VENV)/.done ## Time `imagegpt probe fit` beside scikit-learn on 50,000 rows of 16 layers
	$(PROBE_VENV)/bin/python scripts/probe/bench.py

$(PROBE_VENV)/.done: scripts/probe/requirements.txt
	python3 -m venv $(PROBE_VENV)
	$(PROBE_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

.PHONY: golden-pixels
golden-pixels: $(CORPUS_VENV)/.done ## Remake what Pillow makes of the files in tests/golden/pixels
	$(CORPUS_VENV)/bin/python scripts/corpus/make_pixels.py

$(CORPUS_VENV)/.done: scripts/corpus/requirements.txt
	python3 -m venv $(CORPUS_VENV)
	$(CORPUS_VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

.PHONY: deploy-check
deploy-check: ## Check deploy/: manifests, the Helm chart, images, rules, dashboard, and that a worker exports what they name
	@scripts/deploy-check.sh

.PHONY: deploy-image
deploy-image: build ## Serve from the root of the CPU image, read-only and without a shell (needs root)
	@scripts/deploy-image.sh

.PHONY: deploy-pool
deploy-pool: build ## Run pools as deploy/ says: rolling update, scaling, autoscaling, a job under faults (20 minutes)
	@scripts/deploy-pool.sh
