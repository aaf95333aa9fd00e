"""Decide what an untrusted model's files may do: they are only read. Python code and pickles among
them need --trust-remote-code.
"""

import os

VARIABLE = "TRIVET_TRUST_REMOTE_CODE"  # an environment variable, so that no config file can set it
# Otherwise transformers would ask a server to convert pickles.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def trusted() -> bool:
    """Return whether code and pickles of a model may run: --trust-remote-code, or
    TRIVET_TRUST_REMOTE_CODE=1 in the environment.
    """
    return os.environ.get(VARIABLE) == "1"


def refusal(error: Exception) -> str:
    """Describe what transformers refused to load and the way out; '' if it failed for another
    reason.
    """
    message = str(error)
    if "trust_remote_code" in message or "custom code" in message:
        reason = "it needs Python code of its own"
    elif "use_safetensors" in message or "no file named model.safetensors" in message:
        reason = "its weights are not in safetensors (other formats can run code when loaded)"
    else:
        return ""
    return f"{reason}; inspect its files and, if you trust them, pass --trust-remote-code"
