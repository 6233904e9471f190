// Runs a package of torch_quant.export_inductor without Python, on random inputs, and tells how
// long a call takes.
//
//     run_package model.pt2 8x64 [more inputs: 8x64 float, i8x64 token ids from 0 to 99]
//
// docs/inductor.md says how to compile it. Tensors go in and come out in the order of the package's
// metadata; AOTI_RUNTIME_CHECK_INPUTS=1 has their types and sizes checked.
#include <ATen/Context.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace {

at::Tensor made(const std::string& text) {
    const bool ids = text.front() == 'i';
    std::vector<int64_t> sizes;
    std::stringstream rest(ids ? text.substr(1) : text);
    for (std::string size; std::getline(rest, size, 'x');) sizes.push_back(std::stoll(size));
    return ids ? at::randint(100, sizes, at::kLong) : at::randn(sizes);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) {
        std::cerr << "usage: run_package model.pt2 8x64 [i8x64 ...]\n";
        return 2;
    }
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    for (const auto& [key, value] : model.get_metadata())
        if (key == "inputs" || key == "outputs") std::cout << key << " " << value << "\n";
    at::manual_seed(0);
    std::vector<at::Tensor> inputs;
    for (int i = 2; i < argc; ++i) inputs.push_back(made(argv[i]));
    auto outputs = model.run(inputs);
    for (const auto& y : outputs)
        std::cout << "output " << y.sizes() << " sum " << y.to(at::kDouble).sum().item<double>() << "\n";
    constexpr int calls = 50;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) outputs = model.run(inputs);
    const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
    std::cout << spent.count() / calls << " ms a call\n";
}
