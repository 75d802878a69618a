// One of a multiprocessor's four schedulers: the warps of `resident` programs issue a listing of machine code in order,
// one instruction a cycle; a new program starts where one ends. Fixed latencies are the stalls that the code states,
// the others come with each instruction. Memory beyond the first-level cache is two queues, each with a rate and a
// latency. Built and called by bench/limits/simulate.py.
#include <algorithm>
#include <cstdint>
#include <vector>

extern "C" {
enum Pipe { FMA, HEAVY, ALU, XU, LSU, UNIFORM, CONTROL, TENSOR, PIPES };
enum Kind {
  PLAIN, BACK, EXIT, JUMP, BARRIER, COPY_COMMIT, COPY_WAIT, GROUP_PRODUCT, GROUP_WAIT, LOAD, STORE, COPY,
  EXIT_BEFORE_BACK
};
struct Op {
  int32_t kind, pipe, stall, writes, reads, waits, target, trips, left;
  float cycles, latency, dram, l2;  // of its pipe; of its result; bytes of a warp beyond the caches and from L2
};
struct Machine {
  double dram, l2;  // bytes a cycle and scheduler
  double dram_latency, l2_latency, l1_latency, launch, barrier;
  int32_t fma_units;
};
struct Result { double cycles, issued; int32_t finished; };
}

namespace {
struct Warp {
  int pc = 0, program = -1;
  double next = 0, pending = 0;
  double scoreboard[6] = {};
  bool done = true, waiting = false;
  std::vector<double> copies, products;
  std::vector<int> counts;
};

double nth_last(const std::vector<double>& ends, int left) {
  const int index = static_cast<int>(ends.size()) - left - 1;
  return index < 0 ? 0.0 : ends[index];
}
}  // namespace

extern "C" __attribute__((visibility("default"))) void simulate(const Op* ops, int count, int warps, int resident,
                                                                int programs, const Machine* m, Result* result) {
  std::vector<Warp> all(warps * resident);
  std::vector<int> arrived(resident, 0), alive(resident, 0);
  double busy[PIPES] = {}, lite = 0, dram = 0, l2 = 0, now = 0, end = 0, issued = 0;
  int started = 0, finished = 0, last = -1;

  const auto start = [&](int slot, double at) {
    if (started >= programs) return;
    ++started;
    alive[slot] = warps;
    arrived[slot] = 0;
    for (int i = 0; i < warps; ++i) {
      Warp& w = all[slot * warps + i];
      w = Warp();
      w.done = false;
      w.program = slot;
      w.next = at + m->launch;
      w.counts.assign(count, 0);
    }
  };
  const auto release = [&](int slot, double at) {
    arrived[slot] = 0;
    for (int i = 0; i < warps; ++i) {
      Warp& w = all[slot * warps + i];
      if (w.waiting) w.waiting = false, w.next = std::max(w.next, at);
    }
  };
  // A queue's turn of `bytes`, not before `ready`: when it ends.
  const auto queue = [](double& free, double ready, double bytes, double rate) {
    return free = std::max(free, ready) + bytes / rate;
  };
  for (int slot = 0; slot < resident; ++slot) start(slot, 0);

  while (finished < programs) {
    int best = -1;
    double soonest = 1e300;
    const int size = static_cast<int>(all.size());
    for (int k = 0; k < size; ++k) {  // in turn
      const int index = last < 0 ? k : (last + k) % size;
      const Warp& w = all[index];
      if (w.done || w.waiting) continue;
      const Op& op = ops[w.pc];
      double ready = std::max(w.next, now);
      for (int b = 0; b < 6; ++b)
        if (op.waits >> b & 1) ready = std::max(ready, w.scoreboard[b]);
      if (op.pipe == FMA) ready = std::max(ready, m->fma_units > 1 ? std::min(busy[HEAVY], lite) : busy[HEAVY]);
      else if (op.pipe == LSU) ready = std::max(ready, busy[LSU] - 48.0);  // a queue of its own
      else if (op.pipe == TENSOR && op.kind == GROUP_PRODUCT) ;            // queued by the hardware
      else if (op.pipe != CONTROL) ready = std::max(ready, busy[op.pipe]);
      if (op.kind == COPY_WAIT) ready = std::max(ready, nth_last(w.copies, op.left));
      if (op.kind == GROUP_WAIT) ready = std::max(ready, nth_last(w.products, op.left));
      if (ready < soonest - 1e-9) soonest = ready, best = index;
    }
    if (best < 0) break;
    now = soonest;
    last = best;
    ++issued;
    Warp& w = all[best];
    const Op& op = ops[w.pc];
    const int slot = w.program;
    int next = w.pc + 1;
    bool stop = false;

    double ready = now;
    if (op.pipe == FMA) (m->fma_units > 1 && lite <= now ? lite : busy[HEAVY]) = now + op.cycles;
    else if (op.pipe == LSU) ready = busy[LSU] = std::max(busy[LSU], now) + op.cycles;
    else if (op.kind == GROUP_PRODUCT) ready = busy[TENSOR] = std::max(busy[TENSOR], now) + op.cycles;
    else if (op.pipe != CONTROL) busy[op.pipe] = now + op.cycles;

    double result_at = ready + op.latency;
    const double read_at = ready + (op.pipe == LSU ? 12 : 4);
    if (op.kind == LOAD || op.kind == COPY) {
      const double hit = ready + m->l1_latency;
      result_at = hit;
      if (op.l2 > 0) result_at = queue(l2, hit, op.l2, m->l2) + m->l2_latency - m->l1_latency;
      if (op.dram > 0)
        result_at = std::max(result_at, queue(dram, hit, op.dram, m->dram) + m->dram_latency - m->l1_latency);
      if (op.kind == COPY) w.pending = std::max(w.pending, result_at);
    } else if (op.kind == STORE) {
      if (op.l2 > 0) queue(l2, ready, op.l2, m->l2);
      if (op.dram > 0) queue(dram, ready + m->l1_latency, op.dram, m->dram);
    } else if (op.kind == COPY_COMMIT) {
      w.copies.push_back(std::max(w.copies.empty() ? 0.0 : w.copies.back(), w.pending));
    } else if (op.kind == GROUP_PRODUCT && op.left) {
      w.products.push_back(ready + 32);
    }
    if (op.writes < 6) w.scoreboard[op.writes] = std::max(w.scoreboard[op.writes], result_at);
    if (op.reads < 6) w.scoreboard[op.reads] = std::max(w.scoreboard[op.reads], read_at);

    w.next = now + std::max(1, op.stall);
    if (op.kind == BACK) {
      int& done = w.counts[w.pc];
      if (done < op.trips - 1) ++done, next = op.target, w.next = std::max(w.next, now + 8);
      else done = 0;
    } else if (op.kind == JUMP) {
      next = op.target, w.next = std::max(w.next, now + 8);
    } else if (op.kind == EXIT) {
      stop = true;
    } else if (op.kind == EXIT_BEFORE_BACK) {
      stop = w.counts[w.pc + 1] >= ops[w.pc + 1].trips - 1;
    }
    now += 1;
    w.pc = next;
    if (op.kind == BARRIER) {
      w.waiting = true;
      if (++arrived[slot] >= alive[slot]) release(slot, now + m->barrier);
    }
    if (stop) {
      w.done = true;
      end = std::max({end, now, dram});
      if (--alive[slot] == 0) ++finished, start(slot, now);
      else if (arrived[slot] > 0 && arrived[slot] >= alive[slot]) release(slot, now);
    }
  }
  result->cycles = std::max(end, dram);
  result->issued = issued;
  result->finished = finished;
}
