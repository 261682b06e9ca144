"""The paper's tables: on the testbed, whose truth is known, or on models and data of your own."""
