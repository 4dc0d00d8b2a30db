def ensure_image(env):
    return None
