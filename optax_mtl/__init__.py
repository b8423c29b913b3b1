"""Multi-task learning for Optax: many tasks' gradients in, one balanced update out."""

from optax_mtl._base import BalanceState
from optax_mtl._blocks import block_gramians, block_names
from optax_mtl._blockwise import blockwise, BlockwiseState
from optax_mtl._bundle import bundle, unbundle
from optax_mtl._change_tasks import change_tasks
from optax_mtl._checked import checked
from optax_mtl._combinators import mean_tasks, per_task, shared_and_heads, sum_tasks
from optax_mtl._diagnostics import task_cosines, task_norms
from optax_mtl._features import value_and_feature_grads
from optax_mtl._geometry import balance_in_metric, BalanceInMetricState, precondition_then_balance, second_moment_metric
from optax_mtl._gramian import combine, Gramian, task_cross_gramian, task_gramian
from optax_mtl._light import value_and_light_grads
from optax_mtl._monitor import monitor, MonitorState, recorded, Records, update_shares
from optax_mtl._multi_steps import multi_steps
from optax_mtl._oracles import stack_task_grads, task_names, value_and_task_grads
from optax_mtl._shards import over_axes
from optax_mtl._sketch import value_and_sketched_grads
from optax_mtl._split import split
from optax_mtl._weighting import weighting
from optax_mtl.methods._adaptive_weight_assignment import adaptive_weight_assignment, adaptive_weight_assignment_weights
from optax_mtl.methods._aligned_mtl import aligned_mtl, aligned_mtl_weights
from optax_mtl.methods._apt import apt
from optax_mtl.methods._auto_lambda import auto_lambda, auto_lambda_meta_grads
from optax_mtl.methods._auxi_nash import auxi_nash, auxi_nash_preference_grads
from optax_mtl.methods._bloop import bloop
from optax_mtl.methods._cagrad import cagrad, cagrad_weights
from optax_mtl.methods._cdtt import cdtt, cdtt_tension, cdtt_weights
from optax_mtl.methods._con_fig import con_fig, con_fig_momentum, con_fig_weights
from optax_mtl.methods._cosmos import cosmos, cosmos_weights
from optax_mtl.methods._cov_weighting import cov_weighting, cov_weighting_weights
from optax_mtl.methods._cr_mogm import cr_mogm
from optax_mtl.methods._db_mtl import db_mtl, db_mtl_weights
from optax_mtl.methods._dtp import dtp, dtp_weights
from optax_mtl.methods._dual_proj import dual_proj, dual_proj_weights
from optax_mtl.methods._dwa import dwa, dwa_weights
from optax_mtl.methods._edm import edm, edm_weights
from optax_mtl.methods._excess_mtl import excess_mtl, excess_risks
from optax_mtl.methods._fairgrad import fairgrad, fairgrad_weights
from optax_mtl.methods._famo import famo, famo_logit_grads, famo_weights
from optax_mtl.methods._gls import gls, gls_weights
from optax_mtl.methods._go4align import go4align, go4align_weights, group_means
from optax_mtl.methods._grad_cosine import grad_cosine, grad_cosine_weights
from optax_mtl.methods._graddrop import graddrop
from optax_mtl.methods._gradnorm import gradnorm, gradnorm_weight_grads
from optax_mtl.methods._gradvac import gradvac, gradvac_weights
from optax_mtl.methods._group_dro import group_dro
from optax_mtl.methods._hydalearn import hydalearn, hydalearn_gains, hydalearn_weights
from optax_mtl.methods._ial import ial, ial_weights
from optax_mtl.methods._igb import igb, igb_weights
from optax_mtl.methods._imtl import imtl, imtl_weights
from optax_mtl.methods._imtl_g import imtl_g, imtl_g_weights
from optax_mtl.methods._imtl_l import imtl_l, imtl_l_weights
from optax_mtl.methods._krum import krum, krum_weights
from optax_mtl.methods._ldc_mtl import ldc_mtl, ldc_mtl_factors
from optax_mtl.methods._linear_scalarization import linear_scalarization
from optax_mtl.methods._madam import madam
from optax_mtl.methods._mao import adatask, mao, scale_by_mao
from optax_mtl.methods._mgda import mgda, mgda_weights
from optax_mtl.methods._moco import moco, moco_weights
from optax_mtl.methods._modo import modo, modo_weights
from optax_mtl.methods._mtadam import mtadam, scale_by_mtadam
from optax_mtl.methods._nash_mtl import nash_mtl, nash_mtl_weights
from optax_mtl.methods._ol_aux import ol_aux
from optax_mtl.methods._pbi import pbi, pbi_weights
from optax_mtl.methods._pcd import pcd, pcd_weights
from optax_mtl.methods._pcgrad import pcgrad, pcgrad_weights
from optax_mtl.methods._pike import pike, pike_gains
from optax_mtl.methods._rlw import rlw, rlw_weights
from optax_mtl.methods._scale_invariant import scale_invariant, scale_invariant_weights
from optax_mtl.methods._sdmgrad import sdmgrad, sdmgrad_solution
from optax_mtl.methods._slaw import slaw, slaw_weights
from optax_mtl.methods._stch import stch, stch_weights
from optax_mtl.methods._trimmed_mean import trimmed_mean
from optax_mtl.methods._uncertainty import uncertainty, uncertainty_weights
from optax_mtl.methods._update_every import update_every
from optax_mtl.methods._upgrad import upgrad, upgrad_weights
from optax_mtl.methods._uw_o import uw_o, uw_o_weights
from optax_mtl.methods._uw_so import uw_so, uw_so_weights

__all__ = [
    "BalanceInMetricState",
    "BalanceState",
    "BlockwiseState",
    "Gramian",
    "MonitorState",
    "Records",
    "adaptive_weight_assignment",
    "adaptive_weight_assignment_weights",
    "adatask",
    "aligned_mtl",
    "aligned_mtl_weights",
    "apt",
    "auto_lambda",
    "auto_lambda_meta_grads",
    "auxi_nash",
    "auxi_nash_preference_grads",
    "balance_in_metric",
    "block_gramians",
    "block_names",
    "blockwise",
    "bloop",
    "bundle",
    "cagrad",
    "cagrad_weights",
    "cdtt",
    "cdtt_tension",
    "cdtt_weights",
    "change_tasks",
    "checked",
    "combine",
    "con_fig",
    "con_fig_momentum",
    "con_fig_weights",
    "cosmos",
    "cosmos_weights",
    "cov_weighting",
    "cov_weighting_weights",
    "cr_mogm",
    "db_mtl",
    "db_mtl_weights",
    "dtp",
    "dtp_weights",
    "dual_proj",
    "dual_proj_weights",
    "dwa",
    "dwa_weights",
    "edm",
    "edm_weights",
    "excess_mtl",
    "excess_risks",
    "fairgrad",
    "fairgrad_weights",
    "famo",
    "famo_logit_grads",
    "famo_weights",
    "gls",
    "gls_weights",
    "go4align",
    "go4align_weights",
    "grad_cosine",
    "grad_cosine_weights",
    "graddrop",
    "gradnorm",
    "gradnorm_weight_grads",
    "gradvac",
    "gradvac_weights",
    "group_dro",
    "group_means",
    "hydalearn",
    "hydalearn_gains",
    "hydalearn_weights",
    "ial",
    "ial_weights",
    "igb",
    "igb_weights",
    "imtl",
    "imtl_g",
    "imtl_g_weights",
    "imtl_l",
    "imtl_l_weights",
    "imtl_weights",
    "krum",
    "krum_weights",
    "ldc_mtl",
    "ldc_mtl_factors",
    "linear_scalarization",
    "madam",
    "mao",
    "mean_tasks",
    "mgda",
    "mgda_weights",
    "moco",
    "moco_weights",
    "modo",
    "modo_weights",
    "monitor",
    "mtadam",
    "multi_steps",
    "nash_mtl",
    "nash_mtl_weights",
    "ol_aux",
    "over_axes",
    "pbi",
    "pbi_weights",
    "pcd",
    "pcd_weights",
    "pcgrad",
    "pcgrad_weights",
    "per_task",
    "pike",
    "pike_gains",
    "precondition_then_balance",
    "recorded",
    "rlw",
    "rlw_weights",
    "scale_by_mao",
    "scale_by_mtadam",
    "scale_invariant",
    "scale_invariant_weights",
    "sdmgrad",
    "sdmgrad_solution",
    "second_moment_metric",
    "shared_and_heads",
    "slaw",
    "slaw_weights",
    "split",
    "stack_task_grads",
    "stch",
    "stch_weights",
    "sum_tasks",
    "task_cosines",
    "task_cross_gramian",
    "task_gramian",
    "task_names",
    "task_norms",
    "trimmed_mean",
    "unbundle",
    "uncertainty",
    "uncertainty_weights",
    "update_every",
    "update_shares",
    "upgrad",
    "upgrad_weights",
    "uw_o",
    "uw_o_weights",
    "uw_so",
    "uw_so_weights",
    "value_and_feature_grads",
    "value_and_light_grads",
    "value_and_sketched_grads",
    "value_and_task_grads",
    "weighting",
]

__version__ = "0.1.0"
