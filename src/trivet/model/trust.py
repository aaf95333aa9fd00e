"""What the files of a stranger's model may do here: be read. Python code and pickles among them wait for --trust-remote-code."""

import os

SAID = "TRIVET_TRUST_REMOTE_CODE"  # in the environment, so that no config file can say it
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask a server to convert pickles


def trusted() -> bool:
    """Whether code and pickles of a model may run: --trust-remote-code, or TRIVET_TRUST_REMOTE_CODE=1 in the environment."""
    return os.environ.get(SAID) == "1"


def refusal(error: Exception) -> str:
    """What transformers refused, in a sentence with the way out; '' where it failed for another reason."""
    said = str(error)
    if "trust_remote_code" in said or "custom code" in said:
        what = "it needs Python code of its own"
    elif "use_safetensors" in said or "no file named model.safetensors" in said:
        what = "its weights are not safetensors (another kind can run code when it is read)"
    else:
        return ""
    return f"{what}; look at its files and, if you trust them, give --trust-remote-code"
