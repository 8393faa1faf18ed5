"""Importing this module installs everything: for VERL_USE_EXTERNAL_MODULES, and external_lib."""

from kepo_kernels.integrations.verl.installed import use_kepo

use_kepo()
