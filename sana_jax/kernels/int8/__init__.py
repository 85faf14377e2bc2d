"""Products of int8 rows and int8 weights with int32 sums (W8A8), or of int8 weights alone (W8)."""

from sana_jax.kernels.int8.api import multiply as multiply
from sana_jax.kernels.int8.weights import Quantised as Quantised
from sana_jax.kernels.int8.weights import Simulated as Simulated
from sana_jax.kernels.int8.weights import Watched as Watched
from sana_jax.kernels.int8.weights import Weight as Weight
from sana_jax.kernels.int8.weights import cast as cast
from sana_jax.kernels.int8.weights import is_quantised as is_quantised
from sana_jax.kernels.int8.weights import join as join
from sana_jax.kernels.int8.weights import layer_of as layer_of
from sana_jax.kernels.int8.weights import part as part
