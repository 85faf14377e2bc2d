from sana_jax.kernels.glumbconv.reference import depthwise_conv as depthwise_conv
from sana_jax.kernels.glumbconv.reference import glumbconv as glumbconv
