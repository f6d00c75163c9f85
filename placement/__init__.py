"""Where models go: latency models, workloads, simulators and the search over layouts. No ray, no torch.

| file | what is in it |
|---|---|
| `latency.py` | how long a step takes: DistServe's form, and that of our own engine |
| `workload.py`, `arrivals.py`, `traces.py` | lengths and gaps of requests, drawn or read from a trace |
| `prefixes.py` | how much of each prompt a prefix cache has |
| `outcome.py`, `slo.py` | what a simulation says of each request, and the targets it is held against |
| `pipeline.py` | the simulator in DistServe-compatible mode: its definition, in plain Python |
| `layout.py`, `lanes.py`, `serving.py` | our own system and the definition of its simulator |
| `native.py`, `csrc/` | both simulators in C++, compiled once for a machine; the same results |
| `distserve.py` | DistServe's search, algorithms 1 and 2 |
| `reference.py`, `agreement.py` | a file of reference results, run and compared case by case |
| `candidates.py` | the layouts there are on some devices |
| `bounds.py`, `pools.py`, `goodput.py`, `search.py` | which of them is best |
| `layout_file.py`, `prediction.py`, `cli.py` | `slipstream simulate` |
| `grid.py`, `fit.py`, `profile.py` | which steps are measured, the latency model fitted to them, and what is stored |
| `devices.py`, `roofline.py` | the same for devices that are not at hand, reckoned from a table |
| `topology.py` | nodes, devices, links |
| `live_log.py`, `drift.py`, `forecast.py`, `traffic.py` | what comes, whether it has changed, what is expected |
| `arrangement.py`, `arranged.py`, `load.py`, `reachable.py`, `change.py` | how workers are used, and may be |
| `worker_shape.py`, `shaped.py`, `moving.py`, `startups.py` | the same where TP and PP may change, and in which order |
| `replan_settings.py`, `reactive.py`, `predictive.py`, `replanner.py` | replanning: two loops, and when they may act |
| `replay_start.py`, `replay.py`, `replay_run.py`, `replay_shown.py` | `slipstream plan replay` |
| `lengths.py`, `shapes.py`, `plan.py`, `plan_table.py` | the plan: a search over what topology and profiles allow |
"""
