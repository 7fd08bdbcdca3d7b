from roberta_kernels.cli import main

if __name__ == "__main__":
    main()
