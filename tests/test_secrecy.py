"""What looks like a secret, and what a training needs that does not."""

import pytest

from raysearch.secrecy import is_secret, without_secrets

SECRET = (
    *("OPENAI_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", "GEMINI_API_KEY", "WANDB_API_KEY"),
    *(
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "GITHUB_TOKEN",
        "GH_PAT",
        "NPM_AUTH",
        "SSH_AUTH_SOCK",
        "AZURE_CLIENT_SECRET",
    ),
    *("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "PGPASSWORD"),
    *("MYSQL_PWD", "BORG_PASSPHRASE", "SECRETS_FILE", "MY_APIKEY", "my_api_key", "SIGNING_KEYS", "SESSION_COOKIE"),
    *("OPENCODE_CONFIG_CONTENT", "KEY", "TOKEN"),
)
NEEDED = (
    *("PATH", "HOME", "PWD", "OLDPWD", "USER", "LANG", "LC_CTYPE", "TMPDIR", "SHELL", "TERM", "VIRTUAL_ENV"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH"),
    *(
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "PYTORCH_ALLOC_CONF",
        "TORCH_HOME",
        "NCCL_DEBUG",
        "OMP_NUM_THREADS",
    ),
    *("HF_HOME", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "XDG_CACHE_HOME", "KEYBOARD", "PATTERN"),
    *("RAYSEARCH_STUDY", "RAYSEARCH_CACHE", "RAYSEARCH_MATMUL_TFLOPS", "AUTHOR", "RAY_ADDRESS", "KUBERNETES_PORT"),
)


def test_names_of_secrets_are_known_and_what_a_training_needs_is_kept():
    assert [name for name in SECRET if not is_secret(name, "x")] == []
    assert [name for name in NEEDED if is_secret(name, "/some/where:8080")] == []


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("https://me:hunter2@host/simple", True),
        ("postgres://me:hunter2@db:5432/x", True),
        ("https://abc123@sentry.example.org/7", True),
        ("http://proxy:3128", False),
        ("https://host/a@b", False),
        ("me@example.org", False),
    ],
)
def test_an_address_with_a_user_in_it_is_a_secret(value: str, secret: bool):
    assert is_secret("SOME_URL", value) is secret


def test_what_the_user_names_is_a_secret_whatever_it_looks_like():
    environ = {"PATH": "/bin", "MY_MODEL": "hunter2", "HF_TOKEN": "x"}
    assert without_secrets(environ, ["MY_MODEL", "ABSENT"]) == {"PATH": "/bin"}
    assert without_secrets(environ) == {"PATH": "/bin", "MY_MODEL": "hunter2"}
