import logging

# At its import, which PEFT's brings about, it complains on some processors about a package nobody needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
