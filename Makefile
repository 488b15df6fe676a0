# `make` lists what there is. PYTHON=/path/to/python3.12 chooses the interpreter; ARGS= are passed
# on, as in: make serve ARGS="--port 8001 --model qwen2.5-coder-0.5b-instruct"

BIN := .venv/bin
export PYTHON
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help serve test test-fast slow setup lint parity clients notebooks docs bench golden lines clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

serve: ## install, fetch the chat model (93 MB), serve it on 127.0.0.1:8000
	@sh scripts/setup.sh serve
	@$(BIN)/pellucid pull >/dev/null
	@exec $(BIN)/pellucid serve $(ARGS)

test: .models ## install, fetch the models (860 MB), run the tests
	@$(BIN)/pytest -q -n 2 --dist loadfile $(ARGS)

test-fast: setup ## the tests that need no model, port or download (a minute)
	@PELLUCID_HOME=.venv/no-models $(BIN)/pytest -q -n 2 --dist loadfile \
	--disable-socket --allow-unix-socket -m "not slow and not parity and not clients and not heavy" $(ARGS)

slow: .models ## the tests that take long, notebooks among them, then the comparisons
	@sh scripts/setup.sh parity
	@$(BIN)/pytest -q -m slow $(ARGS)
	@$(MAKE) parity

setup: ## make .venv with everything for development
	@sh scripts/setup.sh dev

lint: setup ## ruff, pyright, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

parity: .models ## compare live with the reference implementations (installs torch)
	@sh scripts/setup.sh parity
	@$(BIN)/pytest -q -m parity $(ARGS)

clients: .models ## run other projects' clients, each in its own environment (1 GB)
	@sh scripts/setup.sh clients
	@$(BIN)/pytest -q -m clients $(ARGS)

golden: .models ## make the golden files of tests/golden again (installs torch)
	@sh scripts/setup.sh parity
	@chat="$$($(BIN)/pellucid pull smollm2-135m-instruct)" && \
	code="$$($(BIN)/pellucid pull qwen2.5-coder-0.5b-instruct)" && \
	for make in tests/golden/*/make_*.py; do echo "$$make"; $(BIN)/python "$$make" \
	"smollm2-135m-instruct=$$chat" "qwen2.5-coder-0.5b-instruct=$$code" || exit 1; done

bench: .models ## measure, and compare with peers (installs torch)
	@sh scripts/setup.sh parity
	@for bench in tests/bench/bench_*.py; do echo "$$bench"; \
	$(BIN)/python -m "tests.bench.$$(basename "$$bench" .py)" || exit 1; done

notebooks: .models ## run notebooks/*.py and write the .ipynb beside each
	@$(BIN)/python scripts/notebooks.py $(ARGS)

docs: ## build the documentation site into build/docs (installs sphinx)
	@sh scripts/setup.sh docs
	@$(BIN)/python -m sphinx -c docs -b html -q -W --keep-going -j auto . build/docs $(ARGS)
	@echo "open build/docs/index.html"

lines: ## count the lines of the library by package
	@for package in audio bpe diffusion serve training transformer; do \
	printf '%7d %s\n' "$$(find $$package -name '*.py' -exec cat {} + | wc -l)" $$package; done

clean: ## remove .venv and caches; models stay in the data folder
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: .models
.models: setup
	@$(BIN)/pellucid pull --all >/dev/null
