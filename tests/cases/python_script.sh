import torch

def main():
    train(learning_rate=1e-5)

if __name__ == '__main__':
    main()
