// What placement/pipeline.py defines, event by event and with every sum in the same order, so that results are equal.

#include <cstdint>
#include <deque>
#include <queue>
#include <tuple>
#include <vector>

namespace {

constexpr double first_stage_ms = 2.0, first_stage_ms_per_token = 1e-4, stage_hop_ms = 1.0;
constexpr int64_t decode_batch_tokens = 50000;

struct Coefficients {
    double a, b, c;
    double at(double x, double y) const { return a + b * x + c * y; }
};

// As placement/native.py declares it.
struct Pipelines {
    Coefficients prefill, decode, large_decode;
    int64_t large_batch, prefill_stages, prefill_cap, decode_stages, colocated;
};

struct Stage {
    Stage(bool is_first, bool is_last) : first(is_first), last(is_last) {}

    bool first, last, busy = false, prefills = false;
    std::deque<int> prompts, decodes;
    std::deque<int> sizes;  // of the batches that `prompts` is made of, past the first stage
    std::vector<int> batch;
};


using Event = std::tuple<double, bool, int64_t, int>;  // when, whether it is a start, how many were made before, stage

class Simulation {
  public:
    Simulation(const Pipelines& p, int n, const int32_t* prompt, const int32_t* output, double* first, double* last)
        : p_(p), prompt_(prompt), output_(output), first_(first), last_(last), decoded_(n) {
        add_stages(p.prefill_stages);
        decode_head_ = p.colocated ? 0 : static_cast<int>(p.prefill_stages);
        if (!p.colocated) add_stages(p.decode_stages);
    }

    void run(int n, const double* arrivals) {
        for (int next = 0; next < n || !events_.empty();) {
            // Arrivals were made before everything else, so they come first at their instant.
            if (next < n && (events_.empty() || arrivals[next] <= std::get<0>(events_.top()))) {
                now_ = arrivals[next];
                stages_[0].prompts.push_back(next++);
                push(now_, true, 0);
                continue;
            }
            const auto [time, starts, made, stage] = events_.top();
            events_.pop();
            now_ = time;
            starts ? begin(stage) : finish(stage);
        }
    }

  private:
    void add_stages(int64_t count) {
        for (int64_t i = 0; i < count; ++i) stages_.emplace_back(i == 0, i == count - 1);
    }

    void push(double time, bool starts, int stage) { events_.push({time, starts, made_++, stage}); }

    void begin(int index) {
        Stage& stage = stages_[index];
        if (stage.busy || (stage.prompts.empty() && stage.decodes.empty())) return;
        stage.busy = true;
        stage.prefills = !stage.prompts.empty();
        stage.batch.clear();
        const double took = stage.prefills ? take_prompts(stage) : take_decodes(stage);
        push(now_ + took, false, index);
    }

    double take_prompts(Stage& stage) {
        int64_t tokens = 0, squares = 0;
        std::size_t most = stage.prompts.size();
        if (!stage.first) {
            most = stage.sizes.front();
            stage.sizes.pop_front();
        }
        while (stage.batch.size() < most) {
            const int64_t length = prompt_[stage.prompts.front()];
            if (stage.first && tokens + length > p_.prefill_cap) break;
            tokens += length;
            squares += length * length;
            stage.batch.push_back(stage.prompts.front());
            stage.prompts.pop_front();
        }
        const double whole = p_.prefill.at(tokens, squares), stages = p_.prefill_stages;
        return whole / stages + stage_hop_ms * stages + first_ms(stage, tokens);
    }

    double take_decodes(Stage& stage) {
        int64_t context = 0;
        while (!stage.decodes.empty()) {
            const int request = stage.decodes.front();
            const int64_t more = prompt_[request] + decoded_[request];
            if (context + more + static_cast<int64_t>(stage.batch.size()) + 1 > decode_batch_tokens) break;
            stage.batch.push_back(request);
            stage.decodes.pop_front();
            context += more;
        }
        const int64_t size = stage.batch.size();
        const Coefficients& c = size < p_.large_batch ? p_.decode : p_.large_decode;
        return c.at(context + size, size) / p_.decode_stages + first_ms(stage, context);
    }

    double first_ms(const Stage& stage, int64_t tokens) const {
        return stage.first ? first_stage_ms + first_stage_ms_per_token * tokens : 0.0;
    }

    void finish(int index) {
        Stage& stage = stages_[index];
        stage.busy = false;
        push(now_, true, index);
        stage.prefills ? prompts_end(index) : decodes_end(index);
    }

    void prompts_end(int index) {
        Stage& stage = stages_[index];
        if (stage.last) {
            for (int request : stage.batch) first_[request] = now_;
            hand_decodes(decode_head_, stage.batch);
            return;
        }
        Stage& next = stages_[index + 1];
        next.prompts.insert(next.prompts.end(), stage.batch.begin(), stage.batch.end());
        next.sizes.push_back(stage.batch.size());
        push(now_, true, index + 1);
    }

    void decodes_end(int index) {
        Stage& stage = stages_[index];
        if (!stage.last) return hand_decodes(index + 1, stage.batch);
        going_on_.clear();
        for (int request : stage.batch) {
            if (++decoded_[request] == output_[request]) last_[request] = now_;
            else going_on_.push_back(request);
        }
        hand_decodes(decode_head_, going_on_);
    }

    void hand_decodes(int index, const std::vector<int>& batch) {
        Stage& stage = stages_[index];
        stage.decodes.insert(stage.decodes.end(), batch.begin(), batch.end());
        push(now_, true, index);
    }

    const Pipelines& p_;
    const int32_t *prompt_, *output_;
    double *first_, *last_;
    std::vector<int32_t> decoded_;
    std::vector<Stage> stages_;
    std::vector<int> going_on_;
    std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
    int decode_head_ = 0;
    int64_t made_ = 0;
    double now_ = 0.0;
};

}  // namespace

extern "C" void simulate_pipelines(const Pipelines* pipelines, int64_t requests, const double* arrivals,
                                   const int32_t* prompt, const int32_t* output, double* first, double* last) {
    Simulation(*pipelines, static_cast<int>(requests), prompt, output, first, last)
        .run(static_cast<int>(requests), arrivals);
}
