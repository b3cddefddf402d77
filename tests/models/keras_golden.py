"""Write keras_golden.json: what Keras computes for the weights and batches of keras_weights.py.

This is not a test, and TensorFlow is not a dependency of the project. To write the file again:

    python -m venv keras && keras/bin/pip install tensorflow-cpu tf-keras
    keras/bin/python tests/models/keras_golden.py

tf-keras is Keras 2, which the reference was written for. Keras 3 updates the moving variance differently.
"""

import json
import os
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf
import tf_keras as keras
from keras_weights import draw_batches, draw_weights

layers = keras.layers


class Gate(layers.Layer):
    """The map, weighted by the 5 largest values of a softmax over its cells; the softmax; and the selected cells."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(1, 1, shape[-1], 1), name="kernel")

    def call(self, x):
        _, height, width, _ = x.shape
        gates = tf.nn.softmax(tf.reshape(tf.nn.conv2d(x, self.kernel, 1, "VALID"), (-1, height * width)))
        values, places = tf.math.top_k(gates, 5)
        chosen = tf.reduce_sum(tf.one_hot(places, height * width), 1)
        kept = tf.reduce_sum(tf.one_hot(places, height * width) * values[..., None], 1)
        return x * tf.reshape(kept, (-1, height, width, 1)), gates, chosen


def active(x):
    return layers.ReLU()(layers.BatchNormalization()(x))


def block(x, channels, stride):
    y = layers.Conv2D(channels, 3, strides=stride, padding="same")(active(x))
    y = layers.Conv2D(channels, 3, padding="same")(active(y))
    return layers.Add()([layers.Conv2D(channels, 1, strides=stride)(x), y])


def build():
    """The model, and one that returns the gates and selected cells of its 4 experts."""
    images = keras.Input((16, 16, 3))
    x = block(block(layers.Conv2D(16, 3, padding="same")(images), 16, 1), 32, 2)
    x = layers.Conv2D(8, 3, strides=2, padding="same")(active(x))
    # Layer by layer, not expert by expert: that is the order of the reference's get_weights().
    gates = [Gate()(x) for _ in range(4)]
    experts = [layers.BatchNormalization()(gate[0]) for gate in gates]
    experts = [layers.Conv2D(4, 1, padding="same")(layers.ReLU()(expert)) for expert in experts]
    x = layers.GlobalAveragePooling2D()(active(layers.concatenate(experts)))
    outputs = layers.Dense(3, activation="softmax")(x)
    return keras.Model(images, outputs), keras.Model(images, [gate[1:] for gate in gates])


def main():
    model, router = build()
    model.set_weights([array.astype(np.float32) for array in draw_weights()])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="sparse_categorical_crossentropy")
    images, labels = draw_batches()
    losses = [float(model.train_on_batch(*batch)) for batch in zip(images, labels, strict=True)]
    routing = router.predict(images[0], verbose=0)
    golden = {
        "versions": {"tensorflow": tf.__version__, "tf_keras": keras.__version__},
        "losses": losses,
        "outputs": model.predict(images[0], verbose=0).tolist(),
        "gates": np.stack([gates for gates, _ in routing], 1).tolist(),
        "selected": np.stack([chosen > 0 for _, chosen in routing], 1).tolist(),
        "norms": [float(np.linalg.norm(array)) for array in model.get_weights()],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
